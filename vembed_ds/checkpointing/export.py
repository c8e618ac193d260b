"""A trained checkpoint as a plain Hugging Face folder.

What the weights belong to lies beside them, see ``describe.py``.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from vembed_ds.checkpointing.adapters import (
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
from vembed_ds.checkpointing.describe import PROJECTIONS, SETTINGS, TRAINING_ONLY, write_json
from vembed_ds.checkpointing.frozen import FROZEN_FILE
from vembed_ds.checkpointing.companions import write_companions
from vembed_ds.errors import CheckpointError
from vembed_ds.models.families import build_from_config, loading_problem
from vembed_ds.models.lora import ADAPTER_CONFIG
from vembed_ds.models.saved_folder import SETTINGS_FILE
from vembed_ds.streams import LOGIT_BIAS, LOGIT_SCALE


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
    components.pop(TRAINING_ONLY, None)
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
        write_companions(partial, settings=_read_settings(partial), adapter=adapter)
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
        components.setdefault(SETTINGS, {})[name] = value


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
        if component == SETTINGS:
            values = {name: float(tensor) for name, tensor in tensors.items()}
            write_json(folder / SETTINGS_FILE, settings | values)
        elif component in PROJECTIONS:
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
