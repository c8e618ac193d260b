"""Parameters in shapes that DeepSpeed cannot take: of no dimension, and of no element.

DeepSpeed 0.19.8 views every parameter as bytes to broadcast it and fails on the 0-dim
``logit_scale`` of every Hugging Face CLIP; it is held as shape ``[1]``, and export gives it its
shape back. ZeRO-3 fails on a parameter of no element (the register tokens of a DINOv3 without
registers); it is held as a buffer of the same name.
"""

from __future__ import annotations

from torch import nn


def lift_scalars(module: nn.Module) -> list[str]:
    """Hold every 0-dim parameter of ``module`` as shape ``[1]``, in place.

    Returns:
        Names of the parameters that changed.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        scalar = getattr(owner, leaf)
        lifted = nn.Parameter(scalar.detach().reshape(1), requires_grad=scalar.requires_grad)
        setattr(owner, leaf, lifted)
        owner.lifted_scalars = {*_lifted(owner), leaf}  # type: ignore[assignment]
    return names


def demote_empty(module: nn.Module) -> None:
    """Hold every parameter of no element as a buffer, in place; there is nothing to train."""
    empty = [name for name, parameter in module.named_parameters() if not parameter.numel()]
    for name in empty:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        value = owner._parameters.pop(leaf)
        assert value is not None
        owner.register_buffer(leaf, value.detach())


def is_lifted(module: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` of ``module`` is, or was before its removal, 0-dim."""
    path, _, leaf = name.rpartition(".")
    return leaf in _lifted(module.get_submodule(path))


def _lifted(owner: nn.Module) -> set[str]:
    # On the module that holds the parameter: attributes of a parameter do not survive a
    # conversion that replaces it.
    found: set[str] = owner.__dict__.get("lifted_scalars", set())
    return found
