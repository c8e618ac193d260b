"""Which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def build_param_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: matrices decay; norms, biases, scalars and single tokens do not.

    Args:
        module: The model; only parameters with ``requires_grad`` are grouped.
        weight_decay: Of the first group.

    Returns:
        Non-empty groups for :func:`deepspeed.initialize`.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decay if _decays(parameter) else no_decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _decays(parameter: nn.Parameter) -> bool:
    if getattr(parameter, "vembed_unreached", False):
        return False  # see models/reach.py: decay would be all that ever moves it
    # A class token is [1, 1, D] and a layer scale [D, 1, 1]: vectors, whatever their dim().
    return sum(size > 1 for size in parameter.shape) >= 2
