"""A trained checkpoint as a plain Hugging Face folder.

At every checkpoint :func:`describe_model` writes what the weights belong to, next to them.
:func:`export_model` needs nothing else, neither the training machine nor its ranks.

=====================  =====================================  ==============================
                       one backbone                           composed encoder
=====================  =====================================  ==============================
root                   config.json, model.safetensors,        tokenizer and image processor,
                       tokenizer, image processor,            vembed_config.json
                       vembed_config.json
text_encoder/,         -                                      config.json, model.safetensors,
image_encoder/                                                own tokenizer, image processor
projection, if any     projection_head.safetensors            text_projection.safetensors,
                                                              image_projection.safetensors
=====================  =====================================  ==============================

Adapters are merged into the weights, or written instead of them: then ``adapter_config.json`` and
``adapter_model.safetensors`` take the place of ``config.json`` and ``model.safetensors``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.dynamic_module_utils import custom_object_save

from vembed_ds.checkpointing.adapters import (
    describe_adapter,
    merge_adapters,
    read_adapter_config,
    write_adapter,
)
from vembed_ds.checkpointing.consolidate import (
    MODEL_FOLDER,
    PARAMETERS_FILE,
    load_consolidated,
    read_parameters,
    resolve_checkpoint,
)
from vembed_ds.checkpointing.frozen import FROZEN_FILE
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.errors import CheckpointError
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TowerEncoder, TwoTowerEncoder
from vembed_ds.models.families import build_from_config, loading_problem
from vembed_ds.models.lora import ADAPTER_CONFIG
from vembed_ds.models.quantized import whole_shape
from vembed_ds.models.scalars import is_lifted
from vembed_ds.streams import LOGIT_BIAS, LOGIT_SCALE

SETTINGS_FILE = "vembed_config.json"
FORMAT_VERSION = 1
_PROJECTIONS = ("projection_head", "text_projection", "image_projection")
_SETTINGS = "settings"  # component of a value that no Hugging Face file has a place for
_TRAINING_ONLY = "training only"  # component of what the loss alone uses


def describe_model(
    folder: Path, *, model: EmbeddingModel, processor: ItemProcessor, settings: Mapping[str, Any]
) -> None:
    """Write everything about the model but its weights. Rank 0 alone; not collective.

    Args:
        folder: ``<checkpoint>/model``; made if need be.
        model: The trained module; its parameters may be partitioned by ZeRO-3.
        processor: Its tokenizer and image processor.
        settings: For ``vembed_config.json``; must be JSON. What the model itself decides
            (pooling, projections, encoder mode, longest input) is written as the model has it.
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
    for key, backbone in _backbones(model).items():
        place = folder / (f"{key}_encoder" if composed else "")
        if getattr(backbone, "_auto_class", None) is not None:
            custom_object_save(backbone, place)  # the model's own code; the config saves its own
        _config(backbone).save_pretrained(place)
        describe_adapter(place, backbone)
    _write_json(folder / SETTINGS_FILE, dict(settings) | _own_settings(model, processor))
    _write_json(folder / PARAMETERS_FILE, _describe_parameters(model, composed=composed))


def export_model(
    checkpoint: Path, out: Path, *, adapter: bool = False, trust_remote_code: bool = False
) -> None:
    """Convert a checkpoint to a Hugging Face folder with float32 weights.

    The folder appears whole or not at all: it is written under another name beside ``out``.

    Args:
        checkpoint: ``<output_dir>/checkpoint-step-<N>``, or ``<output_dir>`` for its ``latest``.
        out: New or empty folder.
        adapter: Write adapters as peft's files, not merged into the weights.
        trust_remote_code: Whether the model's own Python code, which lies in the checkpoint, may run.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or does not fit its description,
            ``out`` holds something, or there is no adapter to write.
    """
    checkpoint, out = resolve_checkpoint(checkpoint), out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty folder; give a new one")
    parameters = read_parameters(checkpoint)
    description = checkpoint / MODEL_FOLDER
    settings = _read_settings(description)
    if adapter and not any(description.rglob(ADAPTER_CONFIG)):
        raise CheckpointError(
            f"{checkpoint}: was trained without use_lora, so it has no adapter; leave out --adapter"
        )
    if adapter and any(entry.get("rounded_to_4_bit") for entry in parameters.values()):
        raise CheckpointError(
            f"{checkpoint}: was trained with load_in_4bit, and beside the base model's own weights "
            "its adapter is not the model that was trained; leave out --adapter"
        )
    components = _split(load_consolidated(checkpoint), parameters, origin=checkpoint)
    components.pop(_TRAINING_ONLY, None)
    if adapter:
        _scalars_to_settings(components, parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        ignore = shutil.ignore_patterns(PARAMETERS_FILE, FROZEN_FILE)
        shutil.copytree(description, partial, ignore=ignore)
        _write_components(
            partial,
            components,
            settings,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
            origin=checkpoint,
        )
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _scalars_to_settings(
    components: dict[str, dict[str, Tensor]], parameters: Mapping[str, Mapping[str, Any]]
) -> None:
    """What the loss learned has no place among an adapter's weights, even if the backbone has one."""
    for name in {LOGIT_SCALE, LOGIT_BIAS} & parameters.keys():
        value = components[parameters[name]["component"]].pop(name)
        components.setdefault(_SETTINGS, {})[name] = value


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
    _write_json(path, settings | trained)


def _own_settings(model: EmbeddingModel, processor: ItemProcessor) -> dict[str, Any]:
    towers = _towers(model)
    composed = len(towers) > 1
    pooling = {(key if composed else ""): tower.pooling for key, tower in towers.items()}
    projections = dict(_projections(model))
    shapes = [projection["shape"] for projection in projections.values()]
    return {
        "format_version": FORMAT_VERSION,
        "encoder_mode": "composed" if composed else "auto",
        "streams": list(model.parts),
        "pooling": pooling,
        "pooling_method": pooling.get("", pooling.get("text")),
        "projections": projections,
        "projection_dim": shapes[0][0] if shapes else None,
        "projection_layers": next((p["layers"] for p in projections.values()), None),
        "topk_tokens": max((tower.topk_tokens or 0 for tower in towers.values()), default=0)
        or None,
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
    if name.startswith("teacher_projections."):
        return _TRAINING_ONLY, name, shape
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
    return _SETTINGS, name, ()


def _shape(value: Tensor) -> tuple[int, ...]:
    whole = whole_shape(value)  # of a weight that is held in 4 bit
    return whole or tuple(getattr(value, "ds_shape", value.shape))  # ZeRO-3 leaves a placeholder


def _read_settings(description: Path) -> dict[str, Any]:
    path = description / SETTINGS_FILE
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    return settings


def _split(
    state: Mapping[str, Tensor], parameters: Mapping[str, Mapping[str, Any]], *, origin: Path
) -> dict[str, dict[str, Tensor]]:
    """Consolidated values by component, under their names and in their shapes there."""
    _check_names(set(state), set(parameters), origin=f"{origin}: {MODEL_FOLDER}/{PARAMETERS_FILE}")
    components: dict[str, dict[str, Tensor]] = {}
    for name, entry in parameters.items():
        value, shape = state[name], tuple(entry["shape"])
        if tuple(value.shape) != shape and not (shape == () and value.numel() == 1):
            raise CheckpointError(
                f"{origin}: {name} has shape {tuple(value.shape)}, described as {shape}"
            )
        # Only where it differs, because a view would hide that two names share one tensor.
        value = value if tuple(value.shape) == shape else value.reshape(shape)
        components.setdefault(entry["component"], {})[entry["name"]] = value
    return components


def _check_names(found: set[str], expected: set[str], *, origin: str) -> None:
    problems = {"missing": expected - found, "unexpected": found - expected}
    text = "; ".join(
        f"{len(names)} {problem}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
        for problem, names in problems.items()
        if names
    )
    if text:
        raise CheckpointError(f"{origin}: the weights do not fit the model: {text}")


def _write_components(
    folder: Path,
    components: dict[str, dict[str, Tensor]],
    settings: dict[str, Any],
    *,
    adapter: bool,
    trust_remote_code: bool,
    origin: Path,
) -> None:
    for component, tensors in components.items():
        if component == _SETTINGS:
            values = {name: float(tensor) for name, tensor in tensors.items()}
            _write_json(folder / SETTINGS_FILE, settings | values)
        elif component in _PROJECTIONS:
            copies = {name: tensor.clone() for name, tensor in tensors.items()}  # unshared memory
            save_file(copies, folder / f"{component}.safetensors", metadata={"format": "pt"})
        else:
            place, described = folder / component, origin / MODEL_FOLDER / component
            _write_encoder(
                place,
                tensors,
                adapter=adapter,
                trust_remote_code=trust_remote_code,
                origin=described,
            )


def _write_encoder(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    adapter: bool,
    trust_remote_code: bool,
    origin: Path,
) -> None:
    config = read_adapter_config(folder)
    if config is not None and adapter:
        write_adapter(folder, tensors, config)
        (folder / "config.json").unlink()  # a reader takes it for a model without its weights
        return
    if config is not None:  # none of a frozen tower beside one that has adapters
        (folder / ADAPTER_CONFIG).unlink()  # transformers would apply it a second time
        tensors = merge_adapters(tensors, config)
    _write_backbone(folder, tensors, trust_remote_code=trust_remote_code, origin=origin)


def _write_backbone(
    folder: Path, tensors: dict[str, Tensor], *, trust_remote_code: bool, origin: Path
) -> None:
    """Let transformers write the weights: its names on disk and shared tensors are its own."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{origin / 'config.json'}: missing; the checkpoint is incomplete")
    model = _skeleton(folder, trust_remote_code=trust_remote_code, origin=origin)
    _check_names(set(tensors), set(model.state_dict()), origin=f"{origin}: {type(model).__name__}")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{origin}: the weights do not fit the model: {error}") from error
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    model.save_pretrained(folder)


def _skeleton(folder: Path, *, trust_remote_code: bool, origin: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return build_from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a model's own code may raise anything, and so may transformers
        problem = loading_problem(error)
        raise CheckpointError(f"{origin}: the model cannot be built: {problem}") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
