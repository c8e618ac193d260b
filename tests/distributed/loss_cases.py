"""What a rank of a test world runs of the losses and the gather."""

from __future__ import annotations

from typing import Any

import torch

from vembed_ds.distributed import comm
from vembed_ds.distributed.gather import gather_rows
from vembed_ds.errors import DataError, VembedError
from vembed_ds.losses import LossInputs, build_loss


def info_nce(
    *, query: torch.Tensor, positive: torch.Tensor, log_scale: float | None, bidirectional: bool
) -> dict[str, Any]:
    """This rank's rows of a global batch: loss, and gradients after data-parallel averaging."""
    share = len(query) // comm.world_size()
    mine = slice(comm.rank() * share, (comm.rank() + 1) * share)
    leaves = [x[mine].clone().requires_grad_() for x in (query, positive)]
    scale = None if log_scale is None else torch.tensor([log_scale], requires_grad=True)
    loss = build_loss("infonce", temperature=0.1, loss_bidirectional=bidirectional)(
        LossInputs(*leaves, scale)
    )
    loss.backward()
    averaged = [leaf.grad / comm.world_size() for leaf in leaves]
    return {
        "loss": float(comm.mean_over_ranks(loss)),
        "query": averaged[0],
        "positive": averaged[1],
        "scale": None if scale is None else float(comm.mean_over_ranks(scale.grad)),
    }


def gather(*, rows: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gather, weigh differently on every rank, and return the gradient of the local rows."""
    leaf = rows[comm.rank()].clone().requires_grad_()
    gathered = gather_rows(leaf)
    (gathered * weights[comm.rank()]).sum().backward()
    return {"gathered": gathered.detach(), "grad": leaf.grad}


def raise_on(rank: int | None) -> str:
    """The message that this rank's ``raise_together`` raises when ``rank`` has an error."""
    error = DataError("row 7 is broken") if comm.rank() == rank else None
    try:
        comm.raise_together(error)
    except VembedError as found:
        return f"{type(found).__name__}: {found}"
    return "nothing"
