"""InfoNCE in all its forms, and ColBERT, which is InfoNCE over MaxSim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vembed_ds.losses.batch import GlobalBatch
from vembed_ds.losses.comparison import Comparison, Selection, compare


def info_nce(
    batch: GlobalBatch,
    *,
    temperature: float,
    selection: Selection,
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of each local row against the columns of every rank.

    ``L = mean_i[ log sum_{c in P_i or N_i} exp(s_ic / t) - mean_{p in P_i} s_ip / t ]`` (van den
    Oord et al. 2018, arXiv 1807.03748, eq. 4; several positives: Khosla et al. 2020, arXiv
    2004.11362, eq. 2, without excluding the row itself). ``joint`` takes one sum over the columns
    of all directions (Li et al. 2023, arXiv 2308.03281, eq. 2), ``per_direction`` the mean of a
    loss per direction (CLIP, Radford et al. 2021, fig. 3).

    Local: the mean over this rank's rows.

    Args:
        batch: The gathered batch.
        temperature: Divides similarities; > 0. Unused when the model learns a logit scale.
        selection: What is a positive and a negative.
        directions: Some of ``comparison.DIRECTIONS``; query_to_doc among them.
        partition: ``joint`` or ``per_direction``.
        reduction: MaxSim's, for token embeddings.

    Returns:
        Scalar float32.
    """
    scale = batch.scale(temperature)
    found = {
        direction: compare(batch, direction, selection=selection, reduction=reduction)
        for direction in directions
    }
    if partition == "joint":
        logits = torch.cat([_denominator(c, scale) for c in found.values()], dim=1)
        return (torch.logsumexp(logits, dim=1) - _attraction(found["query_to_doc"], scale)).mean()
    losses = [
        (torch.logsumexp(_denominator(c, scale), dim=1) - _attraction(c, scale)).mean()
        for c in found.values()
    ]
    return torch.stack(losses).mean()


def colbert(batch: GlobalBatch, **options: object) -> Tensor:
    """:func:`info_nce` over MaxSim, with the same options.

    Raises:
        ValueError: The model gives one vector per item.
    """
    if batch.query.mask is None:
        raise ValueError(
            "loss_type=colbert compares token embeddings [n, L, D], but the model gives one vector "
            f"per item, {tuple(batch.query.values.shape)}"
        )
    return info_nce(batch, **options)  # type: ignore[arg-type]


def in_batch_hard(
    batch: GlobalBatch,
    *,
    temperature: float,
    selection: Selection,
    hard_mining_topk: int,
    use_all_negatives: bool = False,
) -> Tensor:
    """InfoNCE against the K closest negatives of each query only.

    In-batch and explicit negatives compete for the K places. A query without any negative
    contributes 0. Local: the mean over this rank's rows.

    Args:
        batch: The gathered batch.
        temperature: As in :func:`info_nce`.
        selection: What is a negative; without ``multi_positive``.
        hard_mining_topk: K; a query with fewer negatives takes them all.
        use_all_negatives: Take all of them anyway.

    Returns:
        Scalar float32.
    """
    found = compare(batch, "query_to_doc", selection=selection)
    logits = found.similarity * batch.scale(temperature)
    own = logits.gather(1, batch.index.unsqueeze(1))
    hard = logits.masked_fill(~found.negative, -torch.inf)
    if not use_all_negatives:
        hard = hard.topk(min(hard_mining_topk, hard.shape[1]), dim=1).values
    return (torch.logsumexp(torch.cat([own, hard], dim=1), dim=1) - own.squeeze(1)).mean()


def _denominator(found: Comparison, scale: Tensor | float) -> Tensor:
    left_out = ~(found.positive | found.negative)
    return (found.similarity * scale).masked_fill(left_out, -torch.inf)


def _attraction(found: Comparison, scale: Tensor | float) -> Tensor:
    """``[B]``: the mean over a row's positives."""
    logits = (found.similarity * scale).masked_fill(~found.positive, 0.0)
    return logits.sum(dim=1) / found.positive.sum(dim=1)
