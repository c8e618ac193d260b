"""How much memory a rank has, and how much whole parameters and gradients of a model take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from deepspeed.accelerator import get_accelerator
from torch import nn

from vembed_ds.distributed import comm

_SUM_BYTES = 4  # 16-bit gradients of chunks are summed in float32


class WholeBytes(NamedTuple):
    """What a rank takes that has a model's parameters, or the gradient of a step, whole.

    Attributes:
        parameters: All of them, in their precision.
        gradients: Of the trained ones, summed over chunks.
    """

    parameters: int
    gradients: int


def whole_bytes(parameters: Iterable[nn.Parameter], *, element_size: int) -> WholeBytes:
    """Of parameters that are whole, be it in another precision than that of their training.

    Args:
        parameters: Of the model.
        element_size: Bytes per element in training.
    """
    whole = gradients = 0
    for parameter in parameters:
        whole += parameter.numel() * element_size
        if parameter.requires_grad:
            # Beside the sums in float32 stands the last chunk's gradient, in 16 bit.
            rounded = 0 if element_size == _SUM_BYTES else element_size
            gradients += parameter.numel() * (_SUM_BYTES + rounded)
    return WholeBytes(whole, gradients)


def rank_bytes() -> int:
    """Memory of this rank's accelerator; on a CPU its share of the machine's. Local.

    All of it, and not what is free: a resumed run shall choose, and so round, as before.
    """
    accelerator = get_accelerator()
    ranks = comm.local_world_size() if accelerator.device_name() == "cpu" else 1
    return int(accelerator.total_memory()) // ranks
