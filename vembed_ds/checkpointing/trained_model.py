"""The trained module again, from a checkpoint's own tensors; whole in memory, on the host.

It shares nothing with a conversion but the reading of the shards: adapters stay beside the weights
they belong to, and every tensor goes where it was in training, under its name there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from vembed_ds.checkpointing.describe import is_training_only
from vembed_ds.checkpointing.files import MODEL_FOLDER
from vembed_ds.checkpointing.shards import CheckpointReader
from vembed_ds.errors import CheckpointError, ConfigError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_encoder
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TwoTowerEncoder
from vembed_ds.models.families import build_from_config
from vembed_ds.models.lora import ADAPTER, ADAPTER_CONFIG
from vembed_ds.models.saved_folder import read_settings, saved_spec
from vembed_ds.streams import LOGIT_BIAS, LOGIT_SCALE

_SCALARS = (LOGIT_SCALE, LOGIT_BIAS)


def rebuild_trained(
    reader: CheckpointReader, *, trust_remote_code: bool
) -> tuple[EmbeddingModel, ModelSpec]:
    """The model that was trained, in evaluation mode, float32, and how it is built.

    Raises:
        CheckpointError: It cannot be built, or its parameters are not the checkpoint's.
    """
    description = reader.folder / MODEL_FOLDER
    settings = read_settings(description)
    spec = saved_spec(str(description), settings, trust_remote_code=trust_remote_code)
    composed = settings["encoder_mode"] == "composed"
    places = {key: description / (f"{key}_encoder" if composed else "") for key in spec.sources}
    spec = replace(
        spec,
        sources={key: BackboneSource(name=str(place)) for key, place in places.items()},
        adapters={},
        projection_files={},
    )
    try:
        model = EmbeddingModel(build_encoder(spec, load=_empty_backbone))
    except ConfigError as error:
        raise CheckpointError(f"{description}: the model cannot be built: {error}") from error
    for key, place in places.items():
        if (place / ADAPTER_CONFIG).is_file():
            _add_adapters(_backbone(model, key), place)
    _fill(model, reader)
    return model.eval().requires_grad_(False), spec


@torch.no_grad()
def merge_by_peft(model: nn.Module) -> None:
    """Merge adapters into their weights, by peft's code and not by the conversion's."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merge()  # type: ignore[operator]


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype, *, adapters_alone: bool) -> None:
    """Give every floating value what it has in files of another format; still as float32.

    Args:
        model: Changed in place.
        dtype: Of the files.
        adapters_alone: Only what is trained beside base models, as in files of adapters.
    """
    for name, value in model.state_dict().items():
        beside = "lora_" in name or ".backbone." not in name
        if value.is_floating_point() and (beside or not adapters_alone):
            value.copy_(value.to(dtype).to(value.dtype))


def _empty_backbone(spec: ModelSpec, key: str) -> nn.Module:
    place, trusted = spec.sources[key].name, spec.trust_remote_code
    config: Any = AutoConfig.from_pretrained(place, trust_remote_code=trusted)
    model: nn.Module = build_from_config(config, dtype=torch.float32, trust_remote_code=trusted)
    return model


def _backbone(model: EmbeddingModel, key: str) -> nn.Module:
    encoder = model.encoder
    if isinstance(encoder, TwoTowerEncoder):
        return encoder.backbone
    return encoder.tower(key or encoder.parts[0]).backbone


def _add_adapters(backbone: nn.Module, place: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig.from_pretrained(str(place))
    config.modules_to_save, config.inference_mode = None, False  # whole modules stay where they are
    inject_adapter_in_model(config, backbone, adapter_name=ADAPTER)


@torch.no_grad()
def _fill(model: EmbeddingModel, reader: CheckpointReader) -> None:
    own, saved = model.state_dict(), set(reader.names())
    # What the loss learns is no part of an embedding, and may have left the backbone.
    lacking = {n for n in own.keys() - saved if n.rpartition(".")[2] not in _SCALARS}
    more = {n for n in saved - own.keys() if n not in _SCALARS and not is_training_only(n)}
    if lacking or more:
        raise CheckpointError(
            f"{reader.folder}: {min(lacking | more)} is in the checkpoint or in the model that its "
            "description builds, and not in both; so the embeddings cannot be compared"
        )
    for name in own.keys() & saved:
        own[name].copy_(reader.weight(name).reshape(own[name].shape))
