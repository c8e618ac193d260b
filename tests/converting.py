"""Checkpoints of models that nobody trained, without an engine, and the folders made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.parity.families import FAMILIES
from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.checkpointing.export import export_model
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.inference import find_model, load_processor
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.lora import LoraSpec, add_adapters


def save_checkpoint(
    folder: Path,
    model: EmbeddingModel,
    processor: ItemProcessor,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """As one rank leaves it at ZeRO-0 in float32."""
    checkpoint = folder / "checkpoint-step-1"
    checkpoint.mkdir(parents=True)
    saved = {
        "module": model.state_dict(),
        "buffer_names": [name for name, _ in model.named_buffers() if name in model.state_dict()],
        "optimizer": {"state": {}, "param_groups": []},
        "shared_params": None,
        "dp_world_size": 1,
    }
    torch.save(saved, checkpoint / "mp_rank_00_model_states.pt")
    describe_model(
        checkpoint / "model", model=model, processor=processor, settings=dict(settings or {})
    )
    return checkpoint


def family_model(folder: Path, name: str, **options: Any) -> tuple[EmbeddingModel, ItemProcessor]:
    """A model of one of the families, from a folder that is made; ``options`` as of ``ModelSpec``."""
    if not folder.exists():
        FAMILIES[name].save(folder)
    torch.manual_seed(1)
    spec = ModelSpec({"": BackboneSource(name=str(folder))}, **options)
    model = build_model(spec)
    return model, load_processor(find_model(str(folder), trust_remote_code=False), model)


def composed_model(
    folder: Path, *, text_family: str = "bert", **options: Any
) -> tuple[EmbeddingModel, ItemProcessor]:
    """A text encoder of the families and DINOv2, with a projection each."""
    sources, processors = {}, {}
    for stream, name in (("text", text_family), ("image", "dinov2")):
        _, processors[stream] = family_model(folder / name, name)
        sources[stream] = BackboneSource(name=str(folder / name))
    torch.manual_seed(1)
    model = build_model(ModelSpec(sources, **{"projection_dim": 6, **options}))
    text = processors["text"]
    return model, ItemProcessor(
        tokenizer=text.tokenizer,
        max_length=text.max_length,
        image_processor=processors["image"].image_processor,
    )


def adapted(model: EmbeddingModel, **options: Any) -> EmbeddingModel:
    """The model with adapters that do something, in place."""
    add_adapters(model.trained_backbones(), LoraSpec(**{"r": 2, "alpha": 4.0, **options}))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            elif "lora_magnitude" in name:
                parameter.mul_(1.0 + torch.rand_like(parameter))
    return model


def convert(
    folder: Path,
    model: EmbeddingModel,
    processor: ItemProcessor,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """The converted folder of a model; ``options`` as of ``export_model``."""
    checkpoint = save_checkpoint(folder / "run", model, processor, settings)
    export_model(checkpoint, folder / "out", **options)
    return folder / "out"
