"""Losses that pull a student's similarities, or embeddings, towards a teacher's.

Shapes: B rows of this rank (its queries), r of them at a time, C columns (the documents of all
ranks). Losses are means over this rank's rows, so that the mean over ranks is that of the whole
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vembed_ds.distributed import comm
from vembed_ds.losses.inputs import LossInputs, TeacherVectors
from vembed_ds.losses.judges import Judge, Judged
from vembed_ds.losses.ranking import inversions
from vembed_ds.losses.running import RunningSum
from vembed_ds.losses.similarities import Similarities
from vembed_ds.losses.tiles import Tile, tiled
from vembed_ds.similarity import Embeddings, unit_length


def kl(
    student: Similarities,
    judge: Judge,
    *,
    temperature: float,
    teacher_temperature: float | None = None,
) -> Tensor:
    """``T^2 mean_i KL(softmax(t_i / U) || softmax(s_i / T))`` over a row's columns.

    Hinton et al. 2015, arXiv 1503.02531, section 2; the predecessor's formula, over the columns of
    all ranks. The gradient is that of ``T (softmax(s_i / T) - softmax(t_i / U))``.

    Args:
        student: s, with gradient.
        judge: Of the same columns.
        temperature: T > 0.
        teacher_temperature: U > 0, for scores of another range; ``None``: T.
    """
    loss = _Divergence(judge, student, scale=1 / (teacher_temperature or temperature))
    return temperature**2 * tiled(loss, [student], scale=1 / temperature).mean()


class _Divergence:
    """``KL(p || q)`` of every row, of what the teacher knows, from running sums.

    With ``p = exp(y) / P`` and ``q = exp(x) / Q`` it is ``sum_c exp(y) (y - x) / P - log P + log Q``:
    the difference of numbers that may be a thousand times as large, so that all sums are taken in
    float64.
    """

    def __init__(self, judge: Judge, student: Similarities, *, scale: float) -> None:
        self._judge, self._scale = judge, scale
        self._student = RunningSum(("powers",), of=student)
        self._teacher = RunningSum(("powers", "differences"), of=student)

    def add(self, tile: Tile) -> None:
        """See :class:`vembed_ds.losses.tiles.TileLoss`."""
        student, teacher, known = self._logits(tile)
        powers = self._student.rise(tile.rows, student)
        self._student.sums["powers"][tile.rows] += _exact_sums(powers)
        powers = self._teacher.rise(tile.rows, teacher)
        self._teacher.sums["powers"][tile.rows] += _exact_sums(powers)
        difference = teacher.double() - student
        if known is not None:
            difference.masked_fill_(~known, 0.0)  # of infinities
        self._teacher.sums["differences"][tile.rows] += _exact_sums(difference.mul_(powers))

    def terms(self) -> Tensor:
        """See :class:`vembed_ds.losses.tiles.TileLoss`."""
        of_teacher, of_student = self._teacher.sums, self._student.sums
        rows = of_teacher["differences"] / of_teacher["powers"]
        rows = rows - of_teacher["powers"].log() + of_student["powers"].log()
        return rows + (self._student.highest.double() - self._teacher.highest).squeeze(1)

    def gradient(self, tile: Tile, outer: Tensor) -> Tensor:
        """See :class:`vembed_ds.losses.tiles.TileLoss`."""
        student, teacher, _ = self._logits(tile)
        q, p = (
            running.powers(tile.rows, some).div_(
                running.sums["powers"][tile.rows].unsqueeze(1).to(some.dtype)
            )
            for running, some in ((self._student, student), (self._teacher, teacher))
        )
        return q.sub_(p).mul_(outer)

    def _logits(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of student and teacher, minus infinity where the teacher knows nothing; where it does."""
        teacher, known = self._judge.tile(tile.rows, tile.columns)
        student, teacher = tile.logits, teacher * self._scale
        if known is not None:
            student, teacher = (x.masked_fill(~known, -torch.inf) for x in (student, teacher))
        return student, teacher, known


def _exact_sums(terms: Tensor) -> Tensor:
    return terms.sum(dim=1, dtype=torch.float64)


def mse(student: Tensor, judged: Judged) -> Tensor:
    """``mean_c (s_ic - t_ic)^2`` over a row's columns; every query weighs the same.

    Args:
        student: ``[r, C]`` similarities s of some rows; here and below.
        judged: Of the same rows; here and below.

    Returns:
        ``[r]``; here and below.
    """
    return _row_means((student - judged.teacher).square(), judged.known)


def margin_mse(student: Tensor, judged: Judged) -> Tensor:
    """``mean_n ((s_ii - s_in) - (t_ii - t_in))^2`` (Hofstaetter et al. 2020, arXiv 2010.02666).

    Over the query's own explicit negatives; a query that has none takes all other documents of the
    batch, where the teacher knows them. Without any negative it contributes 0.
    """
    own = judged.own.unsqueeze(1)
    others = judged.known & (torch.arange(judged.known.shape[1], device=own.device) != own)
    has_explicit = judged.explicit.any(dim=1, keepdim=True)
    negative = torch.where(has_explicit, judged.explicit, others)
    margins = student.gather(1, own) - student
    wanted = judged.teacher.gather(1, own) - judged.teacher
    return _row_means((margins - wanted).square(), negative)


def rank(student: Tensor, judged: Judged, *, scale: float) -> Tensor:
    """CoSENT over a row: ``log(1 + sum_{t_ia < t_ib} exp(scale (s_ia - s_ib)))``.

    Keeps the teacher's order, whatever its similarities' range (CoSENT: Su 2022; Huang et al. 2024,
    doi 10.1109/TASLP.2024.3402087).

    Args:
        student: Similarities.
        judged: Values that differ by no more than ``tie`` have no order.
        scale: Multiplies the student's.
    """
    return inversions(student * scale, judged.teacher, known=judged.known, tie=judged.tie)


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


def _row_means(values: Tensor, where: Tensor) -> Tensor:
    """``[B]``: mean over the columns that count; 0 where none does."""
    return values.masked_fill(~where, 0.0).sum(dim=1) / where.sum(dim=1).clamp(min=1)


def weighted(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_k w_k L_k / sum_k w_k``."""
    total = sum(weights)
    return torch.stack([t * (w / total) for t, w in zip(terms, weights, strict=True)]).sum()
