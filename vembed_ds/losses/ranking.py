"""Losses on differences of similarities: triplet and CoSENT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vembed_ds.distributed.gather import gather_rows
from vembed_ds.losses.batch import GlobalBatch
from vembed_ds.losses.comparison import Selection, compare
from vembed_ds.losses.tiles import by_rows
from vembed_ds.similarity import paired_similarity


def triplet(batch: GlobalBatch, *, triplet_margin: float, selection: Selection) -> Tensor:
    """Margin to the hardest negative (Schroff et al. 2015, arXiv 1503.03832, eq. 3, with cosine).

    ``L = mean_i relu(max_n s_in - s_ii + m)`` over the query's own explicit negatives; a query
    that has none takes the other documents of the batch. Without any negative it contributes 0.
    Local: the mean over this rank's rows.

    Args:
        batch: The gathered batch.
        triplet_margin: m.
        selection: What is a negative; without ``multi_positive``.

    Returns:
        Scalar float32.
    """

    def losses(rows: slice, own: Tensor, others: Tensor, negative: Tensor) -> Tensor:
        hardest = others.masked_fill(~negative, -torch.inf).amax(dim=1)
        return torch.relu(hardest - own + triplet_margin)

    return _own_or_in_batch(batch, selection, losses).mean()


def cosent(batch: GlobalBatch, *, cosent_scale: float, selection: Selection) -> Tensor:
    """CoSENT (Su 2022; Huang et al. 2024, doi 10.1109/TASLP.2024.3402087).

    With graded scores y, over all pairs of pairs of the global batch:
    ``L = log(1 + sum_{y_i < y_j} exp(scale (s_ii - s_jj)))``. Without scores, over the negatives
    of each query: ``L = log(1 + sum_i sum_{n in N_i} exp(scale (s_in - s_ii)))``; N_i are its own
    explicit negatives or, when it has none, the other documents of the batch.

    Global: one scalar, the same on every rank.

    Args:
        batch: The gathered batch.
        cosent_scale: Multiplies cosines.
        selection: What is a negative; without ``multi_positive``. Not used with scores.

    Returns:
        Scalar float32.
    """
    if batch.scores is not None:
        pairs = gather_rows(paired_similarity(batch.query, batch.positive))
        scaled = pairs.double() * cosent_scale
        return inversions(scaled[None], batch.scores[None]).squeeze(0).to(pairs.dtype)

    def terms(rows: slice, own: Tensor, others: Tensor, negative: Tensor) -> Tensor:
        margins = (others - own.unsqueeze(1)) * cosent_scale
        return torch.logsumexp(margins.masked_fill(~negative, -torch.inf), dim=1)

    found = _own_or_in_batch(batch, selection, terms)
    ranks = gather_rows(torch.logsumexp(found, dim=0, keepdim=True))
    return log_one_plus(torch.logsumexp(ranks, dim=0))


def log_one_plus(log_sum: Tensor) -> Tensor:
    """``log(1 + exp(x))``, with all its digits also where it is small."""
    return torch.logaddexp(log_sum, torch.zeros_like(log_sum))


def inversions(
    values: Tensor,
    wanted: Tensor,
    *,
    known: Tensor | None = None,
    tie: Tensor | None = None,
) -> Tensor:
    """CoSENT over a row: ``log(1 + sum_{w_a < w_b} exp(x_a - x_b))``.

    Columns are sorted by what is wanted, so that memory is linear in their number, not square.

    Args:
        values: x, ``[r, C]``.
        wanted: w, ``[r, C]``, whose order x shall have.
        known: ``[r, C]`` bool, which columns take part; ``None``: all.
        tie: ``[r, 1]``, wanted values that differ by no more have no order; ``None``: equal ones.

    Returns:
        ``[r]``; NaN where something wanted is NaN, which has no order.
    """
    if known is None:
        known = torch.ones_like(wanted, dtype=torch.bool)
    # What is not known goes first, and weighs nothing.
    sorted_wanted, order = wanted.masked_fill(~known, -torch.inf).sort(dim=1)
    values, known = values.gather(1, order), known.gather(1, order)
    below = torch.logcumsumexp(values.masked_fill(~known, -torch.inf), dim=1)
    # Of how many columns is less really wanted?
    bound = sorted_wanted if tie is None else sorted_wanted - tie
    lower = torch.searchsorted(sorted_wanted, bound.contiguous())
    sums = below.gather(1, (lower - 1).clamp(min=0))
    # Not where nothing is below: minus infinity there would give NaN in the backward pass.
    valid = known & (lower > (~known).sum(dim=1, keepdim=True))
    terms = torch.where(valid, sums - values, -torch.inf)
    undefined = (known & sorted_wanted.isnan()).any(dim=1)
    return log_one_plus(torch.logsumexp(terms, dim=1)).masked_fill(undefined, torch.nan)


def _own_or_in_batch(
    batch: GlobalBatch,
    selection: Selection,
    terms: Callable[[slice, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """``[B]``: terms of every row, computed for some rows at a time.

    They are given the rows, the similarities of their own pairs ``[r]``, those of all documents
    ``[r, C]``, and which of these count: a query's own explicit negatives; for a query without any,
    the in-batch ones.
    """
    found, every = compare(batch, "query_to_doc", selection=selection), slice(None)

    def of_rows(rows: slice, similarity: Tensor) -> Tensor:
        own = similarity.gather(1, batch.index[rows].unsqueeze(1)).squeeze(1)
        negative = found.choose(rows, every).negative(similarity)
        explicit, in_batch = (
            negative & batch.documents.explicit,
            negative & ~batch.documents.explicit,
        )
        # Not an `if`: every rank must build the same graph.
        counts = torch.where(explicit.any(dim=1, keepdim=True), explicit, in_batch)
        return terms(rows, own, similarity, counts)

    return by_rows(found.similarities, of_rows)
