"""Adapters in a checkpoint: merged into plain weights, or written as peft's files.

In the trained module an adapted layer ``X`` has the parameters ``X.base_layer.weight`` (and
``.bias``), ``X.lora_A.default.weight``, ``X.lora_B.default.weight`` and, with DoRA,
``X.lora_magnitude_vector.default.weight``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from vembed_ds.errors import CheckpointError
from vembed_ds.models.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_config,
    inside,
    merged_weight,
    scaling_of,
)

_BASE = ".base_layer."
# peft's names leave out the adapter's; a DoRA vector has no `.weight` there.
_PEFT_NAMES = {
    f"lora_A.{ADAPTER}.weight": "lora_A.weight",
    f"lora_B.{ADAPTER}.weight": "lora_B.weight",
    f"lora_magnitude_vector.{ADAPTER}.weight": "lora_magnitude_vector",
}


def describe_adapter(folder: Path, backbone: nn.Module) -> None:
    """Write ``adapter_config.json`` where the backbone has adapters."""
    config = adapter_config(backbone)
    if config is None:
        return
    content = {**config.to_dict(), "inference_mode": True}  # as peft writes it
    text = json.dumps(content, indent=2, sort_keys=True, default=sorted)  # sets, in some order
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """What :func:`describe_adapter` wrote; ``None``: the backbone had no adapters.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    return config


def merge_adapters(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The backbone's own names, with every adapter merged into the weight it belongs to.

    Args:
        tensors: Of one backbone, by name in the trained module, float32.
        config: Its adapter configuration.

    Raises:
        CheckpointError: A layer's adapter is not whole.
    """
    plain = {n.replace(_BASE, "."): t for n, t in tensors.items() if not _of_adapter(n)}
    layers = [n.removesuffix(f"{_BASE}weight") for n in tensors if n.endswith(f"{_BASE}weight")]
    for layer in layers:
        a, b, magnitude = (tensors.get(f"{layer}.{name}") for name in _PEFT_NAMES)
        if a is None or b is None or (magnitude is None) == config["use_dora"]:
            raise CheckpointError(f"{layer}: its adapter is not whole in the checkpoint")
        plain[f"{layer}.weight"] = merged_weight(
            plain[f"{layer}.weight"],
            a,
            b,
            magnitude,
            scaling=scaling_of(config),
            transposed=config["fan_in_fan_out"],
        )
    return plain


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write ``adapter_model.safetensors`` beside the ``adapter_config.json`` that is there.

    Args:
        folder: Exists.
        tensors: Of one backbone, by name in the trained module, float32.
        config: Its adapter configuration.

    Raises:
        CheckpointError: The base model cannot be named.
    """
    if not config["base_model_name_or_path"]:
        raise CheckpointError(
            f"{folder.name}: the adapter's base model began from random weights, so nobody has "
            "it; leave out --adapter to write the merged model"
        )
    whole = config["modules_to_save"] or ()
    kept = {n: t for n, t in tensors.items() if _of_adapter(n) or inside(n, whole)}
    named = {f"base_model.model.{_peft_name(n)}": t.clone() for n, t in kept.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _of_adapter(name: str) -> bool:
    return name.endswith(tuple(_PEFT_NAMES))


def _peft_name(name: str) -> str:
    for ending, theirs in _PEFT_NAMES.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + theirs
    return name
