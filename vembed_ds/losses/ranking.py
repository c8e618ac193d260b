"""Losses on differences of similarities: triplet and CoSENT."""

from __future__ import annotations

import torch
from torch import Tensor

from vembed_ds.distributed.gather import gather_rows
from vembed_ds.losses.batch import GlobalBatch
from vembed_ds.losses.comparison import Selection, compare
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
    own, others, negative = _own_or_in_batch(batch, selection)
    hardest = others.masked_fill(~negative, -torch.inf).amax(dim=1)
    return torch.relu(hardest - own + triplet_margin).mean()


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
        pairs = paired_similarity(batch.query, batch.positive)
        differences = pairs.unsqueeze(1) - gather_rows(pairs)
        counts = batch.scores[batch.index].unsqueeze(1) < batch.scores
    else:
        own, others, counts = _own_or_in_batch(batch, selection)
        differences = others - own.unsqueeze(1)
    terms = (differences * cosent_scale).masked_fill(~counts, -torch.inf)
    ranks = gather_rows(torch.logsumexp(terms.flatten(), dim=0, keepdim=True))
    return torch.logsumexp(torch.cat([ranks.new_zeros(1), ranks]), dim=0)


def _own_or_in_batch(batch: GlobalBatch, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """``[B]`` similarity of the own pair, ``[B, C]`` of all documents, ``[B, C]`` which count.

    A query's own explicit negatives count; for a query without any, the in-batch ones.
    """
    found = compare(batch, "query_to_doc", selection=selection)
    own = found.similarity.gather(1, batch.index.unsqueeze(1)).squeeze(1)
    explicit = found.negative & batch.documents.explicit
    in_batch = found.negative & ~batch.documents.explicit
    # Not an `if`: every rank must build the same graph.
    return own, found.similarity, torch.where(explicit.any(dim=1, keepdim=True), explicit, in_batch)
