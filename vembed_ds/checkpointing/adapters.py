"""Adapters in a checkpoint: merged into plain weights, or written as peft's files.

In the trained module an adapted layer ``X`` has the parameters ``X.base_layer.weight`` (and
``.bias``), ``X.lora_A.default.weight``, ``X.lora_B.default.weight`` and, with DoRA,
``X.lora_magnitude_vector.default.weight``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vembed_ds.errors import CheckpointError
from vembed_ds.models.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapter_config,
    merged_weight,
    saved_by_peft,
    scaling_of,
)

_BASE = ".base_layer."
_WEIGHT = f"{_BASE}weight"
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


def plain_names(names: Collection[str]) -> dict[str, str]:
    """Name of every weight of the backbone without its adapters, with its name beside them.

    Args:
        names: Of one backbone's values in the trained module.
    """
    return {name.replace(_BASE, "."): name for name in names if not _of_adapter(name)}


def check_adapters(names: Collection[str], config: Mapping[str, Any]) -> None:
    """See that every adapted layer has its adapter.

    Args:
        names: As in :func:`plain_names`.
        config: The backbone's adapter configuration.

    Raises:
        CheckpointError: A layer's adapter is not whole.
    """
    for layer in (n.removesuffix(_WEIGHT) for n in names if n.endswith(_WEIGHT)):
        a, b, magnitude = (f"{layer}.{ending}" in names for ending in _PEFT_NAMES)
        if not (a and b) or magnitude != config["use_dora"]:
            raise CheckpointError(f"{layer}: its adapter is not whole in the checkpoint")


def is_adapted(name: str) -> bool:
    """Whether a weight, by its name beside adapters, is one that an adapter is added to."""
    return name.endswith(_WEIGHT)


def merge_adapter(name: str, read: Callable[[str], Tensor], config: Mapping[str, Any]) -> Tensor:
    """The weight ``name`` with its adapter merged into it; of one layer at a time.

    Args:
        name: For which :func:`is_adapted` holds.
        read: Gives a value of the backbone, float32, by its name beside adapters.
        config: The backbone's adapter configuration.
    """
    layer = name.removesuffix(_WEIGHT)
    endings = list(_PEFT_NAMES) if config["use_dora"] else list(_PEFT_NAMES)[:2]
    a, b, *rest = (read(f"{layer}.{ending}") for ending in endings)
    return merged_weight(
        read(name),
        a,
        b,
        rest[0] if rest else None,
        scaling=scaling_of(config),
        transposed=config["fan_in_fan_out"],
    )


def adapter_names(
    names: Collection[str], config: Mapping[str, Any], *, place: str
) -> dict[str, str]:
    """Name of every value in ``adapter_model.safetensors``, with its name in the trained module.

    Args:
        names: As in :func:`plain_names`.
        config: The backbone's adapter configuration.
        place: Where it is to be written, for messages.

    Raises:
        CheckpointError: The base model cannot be named, or peft would not read what is written.
    """
    if not config["base_model_name_or_path"]:
        raise CheckpointError(
            f"{place}: the adapter's base model began from random weights, so nobody has "
            "it; leave out --adapter to write the merged model"
        )
    whole = config["modules_to_save"] or ()
    kept = [name for name in names if _of_adapter(name) or saved_by_peft(name, whole)]
    if alike := [name.removesuffix(_WEIGHT) for name in kept if is_adapted(name)]:
        raise CheckpointError(
            f"{place}: {alike[0]} has an adapter and ends like one of lora_modules_to_save="
            f"{whole}, so that peft would take it for one; leave out --adapter to write the merged "
            "model"
        )
    return {f"base_model.model.{_peft_name(name)}": name for name in kept}


def _of_adapter(name: str) -> bool:
    return name.endswith(tuple(_PEFT_NAMES))


def _peft_name(name: str) -> str:
    for ending, theirs in _PEFT_NAMES.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + theirs
    return name
