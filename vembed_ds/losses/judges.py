"""What a teacher says of the documents, by its embeddings or by scores in the data.

Shapes as in :mod:`vembed_ds.losses.distillation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vembed_ds.losses.batch import GlobalBatch, gather_batch
from vembed_ds.losses.inputs import LossInputs, TeacherScores, TeacherVectors
from vembed_ds.losses.similarities import Similarities, similarities

# Cosines of a teacher as close as this are equal: rounding depends on how many rows a rank has.
TEACHER_TIE = 1e-6


@dataclass(frozen=True)
class Judged:
    """What a teacher says of all documents for some of this rank's queries.

    Attributes:
        teacher: ``[r, C]`` similarities or scores, constants.
        known: ``[r, C]`` bool, where the teacher says something.
        own: ``[r]`` int64, the column of each row's positive.
        explicit: ``[r, C]`` bool, the row's own explicit negatives.
        tie: ``[r, 1]``, how close two values are that only rounding tells apart.
    """

    teacher: Tensor
    known: Tensor
    own: Tensor
    explicit: Tensor
    tie: Tensor


class Judge(Protocol):
    """What a teacher says, made when it is asked for."""

    def tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """``[r, c]`` similarities or scores; ``[r, c]`` bool, where they are known, or everywhere."""

    def of_rows(self, rows: slice) -> Judged:
        """Of all columns."""


@dataclass(frozen=True)
class VectorJudge:
    """A teacher's embeddings of the same items."""

    batch: GlobalBatch
    similarities: Similarities

    def tile(self, rows: slice, columns: slice) -> tuple[Tensor, None]:
        """See :class:`Judge`."""
        return self.similarities.tile(rows, columns), None

    def of_rows(self, rows: slice) -> Judged:
        """See :class:`Judge`."""
        found, _ = self.tile(rows, slice(None))
        own = _own(self.batch, rows)
        return Judged(
            found,
            known=torch.ones_like(found, dtype=torch.bool),
            own=self.batch.index[rows],
            explicit=own & self.batch.documents.explicit,
            # A sum over many tokens has the rounding of its size.
            tie=TEACHER_TIE * found.abs().amax(dim=1, keepdim=True).clamp(min=1.0),
        )


@dataclass(frozen=True)
class ScoreJudge:
    """Scores that stand in the data: known are a query's own positive and explicit negatives.

    Attributes:
        batch: The student's.
        scores: ``[C]`` of every column with the query it belongs to, where that is this rank's.
    """

    batch: GlobalBatch
    scores: Tensor

    def tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """See :class:`Judge`."""
        known = _own(self.batch, rows)[:, columns]
        return self.scores[columns].expand(known.shape).masked_fill(~known, 0.0), known

    def of_rows(self, rows: slice) -> Judged:
        """See :class:`Judge`."""
        found, known = self.tile(rows, slice(None))
        explicit = known & self.batch.documents.explicit
        tie = found.new_zeros(len(found), 1)  # scores are exact, so that every difference counts
        return Judged(found, known=known, own=self.batch.index[rows], explicit=explicit, tie=tie)


def _own(batch: GlobalBatch, rows: slice) -> Tensor:
    return batch.documents.owner == batch.index[rows].unsqueeze(1)


@torch.no_grad()
def judge_by_vectors(
    inputs: LossInputs, teacher: TeacherVectors, *, reduction: str, tile_size: int | None = None
) -> VectorJudge:
    """Compare every local query with the documents of all ranks, as the teacher embeds them.

    Collective: the teacher's vectors are gathered in the order of the student's columns.

    Args:
        inputs: The student's, of this rank.
        teacher: Of the same items; other width, other kind.
        reduction: MaxSim's, for a teacher of token embeddings.
        tile_size: As in :class:`vembed_ds.losses.similarities.Similarities`.
    """
    same_items = LossInputs(
        teacher.query,
        teacher.positive,
        negative=teacher.negative,
        negative_counts=inputs.negative_counts,
    )
    batch = gather_batch(same_items, queries=False)
    compared = similarities(
        batch.query, batch.documents.items, reduction=reduction, tile_size=tile_size
    )
    return VectorJudge(batch, compared)


def judge_by_scores(batch: GlobalBatch, scores: TeacherScores) -> ScoreJudge:
    """Scores that stand in the data.

    Args:
        batch: The student's.
        scores: Of this rank.
    """
    documents = batch.documents
    found = scores.positive.new_zeros(len(documents.items))
    found[batch.index] = scores.positive
    if scores.negative is not None:
        first, last = batch.index[0], batch.index[-1]
        # In the order of the columns, which is that of the pairs and of each pair's negatives.
        own = documents.explicit & (documents.owner >= first) & (documents.owner <= last)
        # An assignment by a mask would wait for the device to count it.
        found = found.masked_scatter(own, scores.negative)
    return ScoreJudge(batch, found)
