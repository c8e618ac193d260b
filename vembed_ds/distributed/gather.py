"""All-gather with a gradient: every rank's rows become columns of every rank's loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vembed_ds.distributed.comm import pretended, world_size
from vembed_ds.distributed.phases import Kind, phase

# torch 2.13 renamed both and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _GatherRows(torch.autograd.Function):
    """Concatenate over ranks; the gradient of a row is the sum over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
        with phase(Kind.WAITING, "gathering embeddings of all ranks"):
            _all_gather(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        local = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        with phase(Kind.WAITING, "scattering gradients of embeddings"):
            _reduce_scatter(local, grad.contiguous())
        return local


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, in rank order, with gradient.

    Collective, forward and backward: every rank calls it with the same shape. The gradient
    that returns is the *sum* over ranks. With a local loss that is the mean over local rows,
    and data-parallel averaging of parameter gradients, the update is that of one process on
    the whole batch: ``(1/N) sum_r dL_r/dx = d(mean_r L_r)/dx``.

    Args:
        rows: ``[B, ...]``, B equal on every rank.

    Returns:
        ``[N * B, ...]``; row ``r * B + i`` is row i of rank r.
    """
    if world_size() == 1:
        return rows
    if pretended() is not None:
        return torch.cat([rows] * world_size())
    gathered: Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
    return gathered
