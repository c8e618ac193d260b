"""What a rank of a test world runs of the losses and the gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vembed_ds.distributed import comm
from vembed_ds.distributed.gather import gather_rows
from vembed_ds.errors import DataError, VembedError
from vembed_ds.losses import (
    Distillation,
    Embeddings,
    Guide,
    LossInputs,
    Prefixes,
    TeacherScores,
    TeacherVectors,
    alpha_schedule,
    build_loss,
)


def loss_and_gradients(
    *,
    loss_type: str,
    batch: dict[str, Any],
    options: dict[str, Any],
    distillation: dict[str, Any] | None = None,
    tile_size: int | None,
) -> dict[str, Any]:
    """This rank's share of a batch as `loss_reference` describes it.

    Args:
        loss_type: Of the task.
        batch: The whole of it.
        options: Of the task.
        distillation: As `distillation_reference` describes it.
        tile_size: As of `build_loss`.

    Returns:
        The loss of the whole batch; per role the gradients of this rank's items, and of the
        learned numbers, after data-parallel averaging.
    """
    mine = _share(batch)
    leaves = {
        role: [item.clone().requires_grad_() for item in mine[role]]
        for role in ("query", "positive", "negative")
    }
    learned = {
        name: torch.tensor([batch[name]], requires_grad=True)
        for name in ("logit_scale", "logit_bias")
        if name in batch
    }
    projections = {
        number: value.clone().requires_grad_() for number, value in mine["projections"].items()
    }
    like = batch["query"][0]
    inputs = LossInputs(
        query=_stack(leaves["query"], like=like),
        positive=_stack(leaves["positive"], like=like),
        negative=_stack(leaves["negative"], like=like) if batch["has_negatives"] else None,
        guide=_guide(mine) if "guide" in mine else None,
        teachers=tuple(_teacher(own, batch, name) for name, own in mine["teachers"].items()),
        projections=projections,
        step=mine["step"],
        **_numbers(mine),
        **learned,
    )
    followed = None if distillation is None else _distillation(distillation, options)
    loss = build_loss(loss_type, distillation=followed, tile_size=tile_size, **options)(inputs)
    loss.backward()
    return {
        "loss": float(comm.mean_over_ranks(loss)),
        **{role: [_average(item) for item in items] for role, items in leaves.items()},
        **{name: float(comm.mean_over_ranks(value.grad)) for name, value in learned.items()},
        "projections": {
            number: comm.mean_over_ranks(value.grad) for number, value in projections.items()
        },
    }


def _share(batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's pairs, and the negatives that belong to them."""
    size = len(batch["query"]) // comm.world_size()
    first = comm.rank() * size
    pairs = slice(first, first + size)
    counts = batch["negative_counts"]
    before = sum(counts[:first])
    negatives = slice(before, before + sum(counts[pairs]))

    def cut(name: str, values: Any) -> Any:
        if isinstance(values, dict):
            return {role: cut(role, rows) for role, rows in values.items()}
        if not isinstance(values, list):
            return values
        return values[negatives if name in ("negative", "negative_keys") else pairs]

    return {name: cut(name, values) for name, values in batch.items()}


def _stack(items: list[Tensor], *, like: Tensor) -> Embeddings:
    if like.dim() == 1:
        return Embeddings(torch.stack(items) if items else _no_rows(like))
    if not items:
        return Embeddings(_no_rows(like), torch.zeros(0, len(like), dtype=torch.bool))
    masks = [torch.ones(len(item), dtype=torch.bool) for item in items]
    # What stands in the padding must not matter.
    return Embeddings(
        pad_sequence(items, batch_first=True, padding_value=7.0),
        pad_sequence(masks, batch_first=True),
    )


def _no_rows(like: Tensor) -> Tensor:
    # Like a slice of the model's outputs: without rows, but part of the graph.
    return like.new_zeros((0, *like.shape), requires_grad=True) * 1.0


def _guide(mine: dict[str, Any]) -> Guide:
    def rows(role: str) -> Tensor:
        return torch.stack(mine["guide"][role]) if mine["guide"][role] else torch.zeros(0, 3)

    negative = rows("negative") if mine["has_negatives"] else None
    return Guide(rows("query"), rows("positive"), negative)


def _teacher(
    mine: dict[str, Any], batch: dict[str, Any], name: str
) -> TeacherVectors | TeacherScores:
    if "query" not in mine:
        negative = torch.tensor(mine["negative"]) if batch["has_negatives"] else None
        return TeacherScores(torch.tensor(mine["positive"]), negative)
    like = batch["teachers"][name]["query"][0]
    negatives = _stack(mine["negative"], like=like) if batch["has_negatives"] else None
    return TeacherVectors(
        _stack(mine["query"], like=like), _stack(mine["positive"], like=like), negatives
    )


def _distillation(given: dict[str, Any], options: dict[str, Any]) -> Distillation:
    prefixes = None
    if options.get("use_mrl"):
        prefixes = Prefixes(
            options["mrl_dims"], options["mrl_weights"], options.get("mrl_layer_weights", (1.0,))
        )
    kind, start, end, num_steps = given["alpha"]
    alpha = alpha_schedule(kind, start=start, end=end, num_steps=num_steps)
    return Distillation(**{**given, "alpha": alpha, "prefixes": prefixes})


def _numbers(mine: dict[str, Any]) -> dict[str, Tensor]:
    names = ["labels", "scores", "query_keys", "positive_keys"]
    if mine["has_negatives"]:
        names += ["negative_counts", "negative_keys"]
    return {
        name: torch.tensor(mine[name], dtype=torch.float32 if name == "scores" else torch.int64)
        for name in names
        if name in mine
    }


def _average(leaf: Tensor) -> Tensor:
    """After data-parallel averaging; a leaf lives on one rank only."""
    grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return grad / comm.world_size()


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
