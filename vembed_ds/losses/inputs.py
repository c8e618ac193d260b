"""What a loss may look at: this rank's share of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field

from torch import Tensor

from vembed_ds.similarity import Embeddings


@dataclass(frozen=True)
class Guide:
    """Vectors of a frozen model that judges which columns are no negatives; constants.

    Attributes:
        query: ``[B, G]`` float32; any length, here and below.
        positive: ``[B, G]``.
        negative: ``[M, G]``; ``None`` when there are no explicit negatives on any rank.
    """

    query: Tensor
    positive: Tensor
    negative: Tensor | None = None


@dataclass(frozen=True)
class TeacherVectors:
    """A teacher's embeddings of this rank's items; constants, of any width and kind.

    Attributes:
        query: B items, float32, not normalised.
        positive: B items.
        negative: M items; ``None`` when there are no explicit negatives on any rank.
    """

    query: Embeddings
    positive: Embeddings
    negative: Embeddings | None = None


@dataclass(frozen=True)
class TeacherScores:
    """A teacher's scores of this rank's pairs that stand in the data; higher is closer.

    Attributes:
        positive: ``[B]`` float32, of query i with its positive.
        negative: ``[M]`` float32, of the explicit negatives with their queries.
    """

    positive: Tensor
    negative: Tensor | None = None


@dataclass
class Watched:
    """What a loss tells of a step that is logged, beside what it is the sum of.

    Attributes:
        accuracy: Of :func:`vembed_ds.losses.watching.in_batch_accuracy`, scalar; ``None``: it has no
            meaning.
        gathered_values: Numbers of the embeddings of all ranks that are columns.
    """

    accuracy: Tensor | None = None
    gathered_values: int = 0


@dataclass(frozen=True)
class LossInputs:
    """Everything a loss may look at, of this rank: B pairs (equal on all ranks), M negatives.

    What is ``None`` on one rank is ``None`` on all. A rank may have M = 0 while others have more;
    it then gives tensors of 0 rows, of the width that the others have.

    Attributes:
        query: B items, float32, not normalised.
        positive: B items; item i answers query i.
        negative: M explicit negatives, those of query 0 first; ``None``: the data has none.
        negative_counts: ``[B]`` int64 on the host, how many of them are each query's; sums to M.
        labels: ``[B]`` int64 class of each pair; equal classes are no negatives of each other.
        scores: ``[B]`` float64, how similar query and positive shall be; higher is closer. Only
            their order counts, so no rounding may make two of them equal.
        query_keys: ``[B]`` int64 hash of what each query holds; equal items have equal keys.
        positive_keys: ``[B]`` int64, likewise.
        negative_keys: ``[M]`` int64, likewise.
        guide: A guide model's vectors of the same items.
        teachers: Of every teacher, in the order of the configuration.
        step: Optimizer steps already done, for schedules.
        projections: ``[G, D]`` learned, by the teacher's number, where its width is another.
        parts: Filled by the loss: what it is the sum of, by name, scalars, detached, for logs.
        watched: Filled by the loss; ``None``: the step is not logged.
        logit_scale: ``[1]`` float32, the log of the inverse temperature, when it is learned.
        logit_bias: ``[1]`` float32, added to scaled similarities by the sigmoid loss.
    """

    query: Embeddings
    positive: Embeddings
    negative: Embeddings | None = None
    negative_counts: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    query_keys: Tensor | None = None
    positive_keys: Tensor | None = None
    negative_keys: Tensor | None = None
    guide: Guide | None = None
    teachers: tuple[TeacherVectors | TeacherScores, ...] = ()
    step: int = 0
    projections: Mapping[int, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    watched: Watched | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None

    def check(self) -> None:
        """Refuse counts that do not fit, naming both.

        Raises:
            ValueError: Always a mistake of the caller.
        """
        if len(self.query) != len(self.positive):
            raise ValueError(
                f"{len(self.query)} queries and {len(self.positive)} positives; expected as many"
            )
        for number, teacher in enumerate(self.teachers):
            self._check_teacher(number, teacher)
        if self.negative is None:
            return
        if self.negative_counts is None:
            raise ValueError("explicit negatives without negative_counts")
        if (total := int(self.negative_counts.sum())) != len(self.negative):
            raise ValueError(
                f"{len(self.negative)} explicit negatives, but negative_counts sum to {total}"
            )

    def _check_teacher(self, number: int, teacher: TeacherVectors | TeacherScores) -> None:
        roles = ("positive", "negative")
        for role in roles if isinstance(teacher, TeacherScores) else ("query", *roles):
            found, expected = _count(getattr(teacher, role)), _count(getattr(self, role))
            if found != expected:
                raise ValueError(
                    f"teacher {number} knows {found} items of role {role}, the batch has {expected}"
                )


def _count(items: Sized | None) -> int:
    return 0 if items is None else len(items)
