"""Which parameters decay, and which have a learning rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn


def build_param_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay; norms, biases, scalars and single tokens do not.

    Two groups, and two more for every rate that parameters were marked with (``models/rates.py``);
    those of the optimizer's own rate come first.

    Args:
        module: The model; only parameters with ``requires_grad`` are grouped.
        weight_decay: Of the matrices.

    Returns:
        Non-empty groups for :func:`deepspeed.initialize`; ``lr`` stands only where it is marked.
    """
    members: dict[float | None, tuple[list[nn.Parameter], list[nn.Parameter]]] = {None: ([], [])}
    for parameter in module.parameters():
        if parameter.requires_grad:
            rate = getattr(parameter, "vembed_lr", None)
            matrices, others = members.setdefault(rate, ([], []))
            (matrices if _decays(parameter) else others).append(parameter)
    groups: list[dict[str, Any]] = []
    for rate, (matrices, others) in members.items():
        own = {} if rate is None else {"lr": rate}
        groups.append({"params": matrices, "weight_decay": weight_decay, **own})
        groups.append({"params": others, "weight_decay": 0.0, **own})
    return [group for group in groups if group["params"]]


def _decays(parameter: nn.Parameter) -> bool:
    if getattr(parameter, "vembed_unreached", False):
        return False  # see models/reach.py: decay would be all that ever moves it
    # A class token is [1, 1, D] and a layer scale [D, 1, 1]: vectors, whatever their dim().
    return sum(size > 1 for size in parameter.shape) >= 2
