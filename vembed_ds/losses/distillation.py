"""Losses that pull a student's similarities, or embeddings, towards a teacher's.

Shapes: B rows of this rank (its queries), C columns (the documents of all ranks). Every function
gives the mean over this rank's rows, so that the mean over ranks is that of the whole batch. Memory
is a few tensors of ``[B, C]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vembed_ds.distributed import comm
from vembed_ds.losses.batch import GlobalBatch, gather_batch
from vembed_ds.losses.inputs import LossInputs, TeacherScores, TeacherVectors
from vembed_ds.similarity import Embeddings, similarity, unit_length

# Cosines of a teacher as close as this are equal: rounding depends on how many rows a rank has.
TEACHER_TIE = 1e-6


@dataclass(frozen=True)
class Judged:
    """What a teacher says of the documents of this rank's queries.

    Attributes:
        teacher: ``[B, C]`` similarities or scores, constants.
        known: ``[B, C]`` bool, where the teacher says something.
        own: ``[B]`` int64, the column of each row's positive.
        explicit: ``[B, C]`` bool, the row's own explicit negatives.
        tie: ``[B, 1]``, how close two values are that only rounding tells apart.
    """

    teacher: Tensor
    known: Tensor
    own: Tensor
    explicit: Tensor
    tie: Tensor


def kl(
    student: Tensor, judged: Judged, *, temperature: float, teacher_temperature: float | None = None
) -> Tensor:
    """``T^2 mean_i KL(softmax(t_i / U) || softmax(s_i / T))`` over a row's columns.

    Hinton et al. 2015, arXiv 1503.02531, section 2; the predecessor's formula, over the columns of
    all ranks. The gradient is that of ``T (softmax(s_i / T) - softmax(t_i / U))``.

    Args:
        student: ``[B, C]`` similarities s, with gradient; here and below.
        judged: Of the same columns, here and below.
        temperature: T > 0.
        teacher_temperature: U > 0, for scores of another range; ``None``: T.
    """
    log_q = _log_softmax(student / temperature, judged.known)
    log_p = _log_softmax(judged.teacher / (teacher_temperature or temperature), judged.known)
    terms = log_p.exp() * (log_p - log_q)
    return temperature**2 * terms.sum(dim=1).mean()


def mse(student: Tensor, judged: Judged) -> Tensor:
    """``mean_i mean_c (s_ic - t_ic)^2`` over a row's columns; every query weighs the same."""
    return _row_means((student - judged.teacher).square(), judged.known).mean()


def margin_mse(student: Tensor, judged: Judged) -> Tensor:
    """``mean_i mean_n ((s_ii - s_in) - (t_ii - t_in))^2`` (Hofstaetter et al. 2020, arXiv 2010.02666).

    Over the query's own explicit negatives; a query that has none takes all other documents of the
    batch, where the teacher knows them. Without any negative it contributes 0.
    """
    own = judged.own.unsqueeze(1)
    others = judged.known & (torch.arange(judged.known.shape[1], device=own.device) != own)
    has_explicit = judged.explicit.any(dim=1, keepdim=True)
    negative = torch.where(has_explicit, judged.explicit, others)
    margins = student.gather(1, own) - student
    wanted = judged.teacher.gather(1, own) - judged.teacher
    return _row_means((margins - wanted).square(), negative).mean()


def rank(student: Tensor, judged: Judged, *, scale: float) -> Tensor:
    """CoSENT over a row: ``mean_i log(1 + sum_{t_ia < t_ib} exp(scale (s_ia - s_ib)))``.

    Keeps the teacher's order, whatever its similarities' range (CoSENT: Su 2022; Huang et al. 2024,
    doi 10.1109/TASLP.2024.3402087). Columns are sorted by the teacher, so that memory is linear in
    C, not square.

    Args:
        student: Similarities.
        judged: Values that differ by no more than ``tie`` have no order.
        scale: Multiplies the student's.
    """
    # What the teacher does not know goes first, and weighs nothing.
    sorted_teacher, order = judged.teacher.masked_fill(~judged.known, -torch.inf).sort(dim=1)
    student = (student * scale).gather(1, order)
    known = judged.known.gather(1, order)
    below = torch.logcumsumexp(student.masked_fill(~known, -torch.inf), dim=1)
    # Of how many columns is the teacher's similarity really lower?
    lower = torch.searchsorted(sorted_teacher, sorted_teacher - judged.tie)
    sums = below.gather(1, (lower - 1).clamp(min=0))
    # Not where nothing is below: minus infinity there would give NaN in the backward pass.
    valid = known & (lower > (~known).sum(dim=1, keepdim=True))
    terms = torch.where(valid, sums - student, -torch.inf)
    zero = terms.new_zeros(len(terms), 1)
    return torch.logsumexp(torch.cat([zero, terms], dim=1), dim=1).mean()


def regression(inputs: LossInputs, teacher: TeacherVectors, projection: Tensor | None) -> Tensor:
    """``mean |P e / |P e| - t / |t||^2`` over all items of all ranks, of every role.

    (TinyBERT, Jiao et al. 2020, arXiv 1909.10351, eq. 8: a learned projection where widths differ;
    of unit vectors, because only directions are searched with: ``2 - 2 cos``.)

    Local: this rank's sum, scaled so that its mean over ranks is the mean over all items.
    Collective: ranks agree on the number of items.

    Args:
        inputs: Of this rank; one vector per item.
        teacher: Its vectors of the same items.
        projection: P ``[G, D]``; ``None``: widths are equal, and P is the identity.

    Raises:
        ValueError: Token embeddings, or other widths without a projection; a mistake of the caller.
    """
    _check_regression(inputs.query, teacher.query, projection)
    pairs = [(inputs.query, teacher.query), (inputs.positive, teacher.positive)]
    if inputs.negative is not None and teacher.negative is not None:
        pairs.append((inputs.negative, teacher.negative))
    total = comm.all_sum([sum(len(student) for student, _ in pairs)])[0]
    distances = []
    for student, target in pairs:
        values = student.values if projection is None else student.values @ projection.T
        unit = unit_length(values)
        distances.append((unit - target.normalized().values).square().sum())
    return torch.stack(distances).sum() * comm.world_size() / total


@torch.no_grad()
def judge_by_vectors(inputs: LossInputs, teacher: TeacherVectors, *, reduction: str) -> Judged:
    """Compare every local query with the documents of all ranks, as the teacher embeds them.

    Collective: the teacher's vectors are gathered in the order of the student's columns.

    Args:
        inputs: The student's, of this rank.
        teacher: Of the same items; other width, other kind.
        reduction: MaxSim's, for a teacher of token embeddings.
    """
    same_items = LossInputs(
        teacher.query,
        teacher.positive,
        negative=teacher.negative,
        negative_counts=inputs.negative_counts,
    )
    batch = gather_batch(same_items, queries=False)
    found = similarity(batch.query, batch.documents.items, reduction=reduction)
    own = batch.documents.owner == batch.index.unsqueeze(1)
    return Judged(
        found,
        known=torch.ones_like(own),
        own=batch.index,
        explicit=own & batch.documents.explicit,
        # A sum over many tokens has the rounding of its size.
        tie=TEACHER_TIE * found.abs().amax(dim=1, keepdim=True).clamp(min=1.0),
    )


def judge_by_scores(batch: GlobalBatch, scores: TeacherScores) -> Judged:
    """Scores that stand in the data: known are a query's own positive and explicit negatives.

    Args:
        batch: The student's.
        scores: Of this rank; exact, so that every difference counts.
    """
    own = batch.documents.owner == batch.index.unsqueeze(1)
    explicit = own & batch.documents.explicit
    found = scores.positive.new_zeros(own.shape)
    found = found.scatter(1, batch.index.unsqueeze(1), scores.positive.unsqueeze(1))
    if scores.negative is not None:
        # Row by row, as the negatives stand in the columns.
        found = found.masked_scatter(explicit, scores.negative)
    tie = found.new_zeros(len(own), 1)
    return Judged(found, known=own, own=batch.index, explicit=explicit, tie=tie)


def cut(inputs: LossInputs, start: int, stop: int) -> LossInputs:
    """The same items, of every embedding only some neighbouring dimensions."""

    def of(items: Embeddings | None) -> Embeddings | None:
        return None if items is None else items.dims(start, stop)

    return replace(
        inputs,
        query=inputs.query.dims(start, stop),
        positive=inputs.positive.dims(start, stop),
        negative=of(inputs.negative),
    )


def _check_regression(student: Embeddings, teacher: Embeddings, projection: Tensor | None) -> None:
    if student.mask is not None or teacher.mask is not None:
        raise ValueError("regression compares one vector per item, not one per token")
    if projection is None and student.width != teacher.width:
        raise ValueError(
            f"the student's embeddings have {student.width} dimensions, the teacher's "
            f"{teacher.width}: regression needs a projection"
        )


def _log_softmax(logits: Tensor, known: Tensor) -> Tensor:
    return torch.log_softmax(logits.masked_fill(~known, -torch.inf), dim=1).masked_fill(~known, 0.0)


def _row_means(values: Tensor, where: Tensor) -> Tensor:
    """``[B]``: mean over the columns that count; 0 where none does."""
    return values.masked_fill(~where, 0.0).sum(dim=1) / where.sum(dim=1).clamp(min=1)


def weighted(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_k w_k L_k / sum_k w_k``."""
    total = sum(weights)
    return torch.stack([t * (w / total) for t, w in zip(terms, weights, strict=True)]).sum()
