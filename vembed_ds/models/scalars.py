"""0-dim parameters, which DeepSpeed cannot broadcast, are held as shape ``[1]``.

DeepSpeed 0.19.8 views every parameter as bytes to broadcast it and fails on the 0-dim
``logit_scale`` of every Hugging Face CLIP. Export gives them their shape back.
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
    return names
