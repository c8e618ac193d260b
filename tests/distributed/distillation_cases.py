"""What a rank runs to count what its teachers do during a run."""

from __future__ import annotations

from typing import Any
from unittest import mock

from tests.distributed.train_cases import run_train
from vembed_ds.data.collators import Batch
from vembed_ds.steps.gradient_cache import StepResult
from vembed_ds.training import loop, teacher_loading


def run_and_count(**arguments: Any) -> dict[str, Any]:
    """As ``run_train``; with the teachers' forward passes up to each step, and what encoded for them."""
    loaded: list[Any] = []
    forwards: list[list[int]] = []
    encoded: list[list[str]] = []
    load, compute = teacher_loading.load_teacher, loop.TrainingLoop.compute_gradient

    def remember(*positional: Any, **keywords: Any) -> Any:
        loaded.append(load(*positional, **keywords))
        return loaded[-1]

    def count(self: loop.TrainingLoop, batch: Batch) -> StepResult:
        result = compute(self, batch)
        forwards.append([teacher.forwards for teacher in loaded])
        encoded.append(sorted(batch.teacher_roles))
        return result

    with (
        mock.patch.object(teacher_loading, "load_teacher", remember),
        mock.patch.object(loop.TrainingLoop, "compute_gradient", count),
    ):
        answer = run_train(**arguments)
    total = [teacher.forwards for teacher in loaded]
    return {**answer, "forwards": forwards, "encoded": encoded, "total": total}
