"""What the weights of a checkpoint belong to, written beside them while training.

:func:`describe_model` writes the folder ``model/``: config, processor, ``vembed_config.json`` and the
place of every parameter. :func:`vembed_ds.checkpointing.export.export_model` needs nothing else
beside the weights, neither the training machine nor its ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from vembed_ds.checkpointing.adapters import describe_adapter
from vembed_ds.checkpointing.files import FACTS_FILE, PARAMETERS_FILE
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TowerEncoder, TwoTowerEncoder
from vembed_ds.models.quantized import whole_shape
from vembed_ds.models.saved_folder import SETTINGS_FILE
from vembed_ds.models.scalars import is_lifted
from vembed_ds.streams import LOGIT_BIAS, LOGIT_SCALE

FORMAT_VERSION = 1
SETTINGS = "settings"  # component of a value that no Hugging Face file has a place for
TRAINING_ONLY = "training only"  # component of what the loss alone uses
PROJECTIONS = ("projection_head", "text_projection", "image_projection")


def describe_model(
    folder: Path,
    *,
    model: EmbeddingModel,
    processor: ItemProcessor,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write everything about the model but its weights. Rank 0 alone; not collective.

    Args:
        folder: ``<checkpoint>/model``; made if need be.
        model: The trained module; its parameters may be partitioned by ZeRO-3.
        processor: Its tokenizer and image processor.
        settings: For ``vembed_config.json``; must be JSON. What the model itself decides
            (pooling, projections, encoder mode, longest input) is written as the model has it.
        facts: What the model card is to tell of the training; must be JSON.
    """
    composed = len(_towers(model)) > 1
    folder.mkdir(parents=True, exist_ok=True)
    _save_processor(folder, processor)
    if composed:
        text, image = (
            ItemProcessor(tokenizer=processor.tokenizer, max_length=processor.max_length),
            ItemProcessor(image_processor=processor.image_processor),
        )
        _save_processor(folder / "text_encoder", text)
        _save_processor(folder / "image_encoder", image)
    if isinstance(model.encoder, TwoTowerEncoder):
        _name_processor(folder, _config(model.encoder.backbone), processor)
    for key, backbone in _backbones(model).items():
        place = folder / (f"{key}_encoder" if composed else "")
        if getattr(backbone, "_auto_class", None) is not None:
            custom_object_save(backbone, place)  # the model's own code; the config saves its own
        _config(backbone).save_pretrained(place)
        describe_adapter(place, backbone)
    write_json(folder / SETTINGS_FILE, dict(settings) | _own_settings(model, processor))
    if facts is not None:
        write_json(folder / FACTS_FILE, facts)
    write_json(folder / PARAMETERS_FILE, _describe_parameters(model, composed=composed))


def _towers(model: EmbeddingModel) -> dict[str, TowerEncoder]:
    encoder = model.encoder
    if isinstance(encoder, TwoTowerEncoder):
        return {}
    return {name: encoder.tower(name) for name in encoder.towers}


def _backbones(model: EmbeddingModel) -> dict[str, nn.Module]:
    encoder = model.encoder
    if isinstance(encoder, TwoTowerEncoder):
        return {"": encoder.backbone}
    return {stream: tower.backbone for stream, tower in _towers(model).items()}


def _config(backbone: nn.Module) -> Any:
    return backbone.config


def _save_processor(folder: Path, processor: ItemProcessor) -> None:
    processor.save_pretrained(folder)
    if processor.tokenizer is None or processor.max_length is None:
        return
    # Readers truncate at `model_max_length` and pad on `padding_side`: as in training, so that
    # the plain tokenizer and model give the embeddings that were trained.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    trained = {"model_max_length": processor.max_length, "padding_side": "right"}
    if "max_length" in settings:  # what processors of texts and images ask first
        trained["max_length"] = processor.max_length
    write_json(path, settings | trained)


def _name_processor(folder: Path, config: Any, processor: ItemProcessor) -> None:
    """Let transformers find the processor of both, also beside an adapter, which has no config."""
    name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if name and processor.tokenizer is not None and processor.image_processor is not None:
        write_json(folder / "processor_config.json", {"processor_class": name})


def _own_settings(model: EmbeddingModel, processor: ItemProcessor) -> dict[str, Any]:
    towers = _towers(model)
    composed = len(towers) > 1
    pooling = {(key if composed else ""): tower.pooling for key, tower in towers.items()}
    projections = dict(_projections(model))
    images = processor.image_processor
    shapes = [projection["shape"] for projection in projections.values()]
    return {
        "format_version": FORMAT_VERSION,
        "encoder_mode": "composed" if composed else "auto",
        "streams": list(model.parts),
        "pooling": pooling,
        "pooling_method": pooling.get("", pooling.get("text")),
        "backbones": {
            (key if composed else ""): {"width": tower.width, "own_pooler": tower.own_pooler}
            for key, tower in towers.items()
        },
        "image_inputs": None if images is None else list(images.model_input_names),
        "projections": projections,
        "projection_dim": shapes[0][0] if shapes else None,
        "projection_layers": next((p["layers"] for p in projections.values()), None),
        "topk_tokens": max((tower.topk_tokens or 0 for tower in towers.values()), default=0),
        "max_seq_length": processor.max_length,
        "pad_to_max_length": processor.pad_to_max_length,
    }


def _projections(model: EmbeddingModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of every projection, its number of layers and ``[embedding width, pooled width]``."""
    towers = _towers(model)
    heads = {name: tower.projection for name, tower in towers.items()}
    if isinstance(model.encoder, TwoTowerEncoder):
        heads = {"": model.encoder.projection}
    for stream, head in heads.items():
        if head is not None:
            matrices = [_shape(p) for p in head.parameters() if len(_shape(p)) == 2]
            shape = [matrices[-1][0], matrices[0][1]]
            name = f"{stream}_projection" if len(heads) > 1 else "projection_head"
            yield name, {"layers": len(matrices), "shape": shape}


def _describe_parameters(model: EmbeddingModel, *, composed: bool) -> dict[str, dict[str, Any]]:
    """Where every value goes, its shape there, and the optimizer group it is trained in."""
    group_of = _optimizer_groups(model)
    persistent = model.state_dict().keys()
    values: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    buffers = model.named_buffers(remove_duplicate=False)
    values |= {name: buffer for name, buffer in buffers if name in persistent}
    seen: set[int] = set()
    entries = {}
    for name, value in values.items():
        component, hf_name, shape = _place(model, name, value, composed=composed)
        group = None if id(value) in seen else group_of.get(id(value))
        seen.add(id(value))
        entries[name] = {
            "component": component,
            "name": hf_name,
            "shape": list(shape),
            "group": group,
        }
        if whole_shape(value):
            entries[name]["rounded_to_4_bit"] = True
    return entries


def _optimizer_groups(model: EmbeddingModel) -> dict[int, int]:
    """Index of the group by ``id`` of the parameter.

    Only ZeRO-0 needs it, which saves its masters without names; ZeRO-3 hides the shapes that
    decide it.
    """
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        return {}
    groups = build_param_groups(model, weight_decay=1.0)
    return {id(p): index for index, group in enumerate(groups) for p in group["params"]}


def _place(
    model: EmbeddingModel, name: str, value: Tensor, *, composed: bool
) -> tuple[str, str, tuple[int, ...]]:
    """Component, name in it, and shape there of a parameter or buffer."""
    if name in (LOGIT_SCALE, LOGIT_BIAS):
        return _place_of_scalar(model, name)
    shape = () if is_lifted(model, name) else _shape(value)
    if is_training_only(name):
        return TRAINING_ONLY, name, shape
    _, kind, *rest = name.split(".")
    stream = ""
    if kind == "towers":
        stream, kind, *rest = rest
    if kind == "projection":
        component = f"{stream}_projection" if composed else "projection_head"
    else:
        component = f"{stream}_encoder" if composed else ""
    return component, ".".join(rest), shape


def _place_of_scalar(model: EmbeddingModel, name: str) -> tuple[str, str, tuple[int, ...]]:
    """The backbone's own scale or bias, where the model's has replaced it."""
    encoder = model.encoder
    if isinstance(encoder, TwoTowerEncoder) and name in encoder.replaced_shapes:
        return "", name, encoder.replaced_shapes[name]
    return SETTINGS, name, ()


def _shape(value: Tensor) -> tuple[int, ...]:
    whole = whole_shape(value)  # of a weight that is held in 4 bit
    return whole or tuple(getattr(value, "ds_shape", value.shape))  # ZeRO-3 leaves a placeholder


def is_training_only(name: str) -> bool:
    """Whether a parameter of the trained module is used by the loss alone."""
    return name.startswith("teacher_projections.")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that people read too."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
