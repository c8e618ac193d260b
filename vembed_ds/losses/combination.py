"""Task and distillation in one loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from vembed_ds.errors import ConfigError
from vembed_ds.losses.batch import GlobalBatch
from vembed_ds.losses.distillation import (
    cut,
    kl,
    margin_mse,
    mse,
    rank,
    regression,
    weighted,
)
from vembed_ds.losses.inputs import LossInputs, TeacherScores, TeacherVectors
from vembed_ds.losses.judges import Judge, Judged, judge_by_scores, judge_by_vectors
from vembed_ds.losses.matryoshka import Prefixes, sum_over
from vembed_ds.losses.similarities import Similarities, similarities
from vembed_ds.losses.tiles import by_rows

Alpha = Callable[[int], float]
"""From the steps already done to the share of the task."""

DISTILLATION_LOSSES = ("kl", "mse", "margin_mse", "rank", "regression")
REGRESSION = "regression"


@dataclass(frozen=True)
class Distillation:
    """How a student follows its teachers.

    Attributes:
        loss_type: One of ``DISTILLATION_LOSSES``.
        weights: Of the teachers; only their proportions matter.
        alpha: Share of the task.
        temperature: Of ``kl``.
        names: Of the teachers, for the log; none: their numbers, from 1.
        teacher_temperatures: Of ``kl``, every teacher's own; none: ``temperature``.
        scale: Of ``rank``.
        reduction: MaxSim's.
        prefixes: Matryoshka; ``None``: whole embeddings.

    Raises:
        ConfigError: Unknown loss.
    """

    loss_type: str
    weights: Sequence[float]
    alpha: Alpha
    temperature: float = 1.0
    names: Sequence[str] = ()
    teacher_temperatures: Sequence[float | None] = ()
    scale: float = 20.0
    reduction: str = "mean"
    prefixes: Prefixes | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in DISTILLATION_LOSSES:
            raise ConfigError(
                f"distillation_loss_type={self.loss_type!r}: no such loss; choose one of "
                f"{', '.join(DISTILLATION_LOSSES)}"
            )

    def combine(self, task: Tensor, batch: GlobalBatch, inputs: LossInputs) -> Tensor:
        """``alpha task + (1 - alpha) sum_k w_k L_k / sum_k w_k``. Collective.

        (The predecessor's convention: alpha is the share of the task.)

        Args:
            task: The task's loss on this rank.
            batch: The student's embeddings, gathered.
            inputs: The same, of this rank, with what its teachers say.
        """
        terms = [
            self._of_teacher(number, teacher, batch, inputs)
            for number, teacher in enumerate(inputs.teachers)
        ]
        alpha, followed = self.alpha(inputs.step), weighted(terms, self.weights)
        inputs.parts.update(task=task.detach(), distillation=followed.detach())
        if len(terms) > 1:
            names = self.names or [str(number) for number in range(1, len(terms) + 1)]
            own = {f"teacher_{name}": t.detach() for name, t in zip(names, terms, strict=True)}
            inputs.parts.update(own)
        return alpha * task + (1 - alpha) * followed

    def _of_teacher(
        self,
        number: int,
        teacher: TeacherVectors | TeacherScores,
        batch: GlobalBatch,
        inputs: LossInputs,
    ) -> Tensor:
        if self.loss_type == REGRESSION:
            assert isinstance(teacher, TeacherVectors)
            return self._regression(inputs, teacher, inputs.projections.get(number))
        if isinstance(teacher, TeacherScores):
            judge: Judge = judge_by_scores(batch, teacher)
        else:
            judge = judge_by_vectors(
                inputs, teacher, reduction=self.reduction, tile_size=batch.tile_size
            )

        def of(start: int, stop: int) -> Tensor:
            part = batch.dims(start, stop)
            student = similarities(
                part.query,
                part.documents.items,
                reduction=self.reduction,
                tile_size=batch.tile_size,
            )
            return self._similarity_loss(student, judge, number)

        return sum_over(self.prefixes, batch.query.width, of)

    def _regression(
        self, inputs: LossInputs, teacher: TeacherVectors, projection: Tensor | None
    ) -> Tensor:
        def of(start: int, stop: int) -> Tensor:
            narrow = None if projection is None else projection[:, : stop - start]
            return regression(cut(inputs, start, stop), teacher, narrow)

        return sum_over(self.prefixes, inputs.query.width, of)

    def _similarity_loss(self, student: Similarities, judge: Judge, number: int) -> Tensor:
        if self.loss_type == "kl":
            own = self.teacher_temperatures[number] if self.teacher_temperatures else None
            return kl(student, judge, temperature=self.temperature, teacher_temperature=own)
        of_rows: dict[str, Callable[[Tensor, Judged], Tensor]]
        of_rows = {"mse": mse, "margin_mse": margin_mse, "rank": partial(rank, scale=self.scale)}
        loss = of_rows[self.loss_type]
        return by_rows(student, lambda rows, part: loss(part, judge.of_rows(rows))).mean()


def alpha_schedule(kind: str, *, start: float, end: float, num_steps: int) -> Alpha:
    """The share of the task over a run.

    Args:
        kind: ``constant`` (start), ``linear`` or ``cosine`` from start to end.
        start: At the first step.
        end: At the last step.
        num_steps: Of the run.
    """

    def alpha(step: int) -> float:
        progress = min(step / max(1, num_steps - 1), 1.0)
        if kind == "constant":
            return start
        if kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return start + (end - start) * progress

    return alpha
