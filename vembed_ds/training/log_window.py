"""What was seen since the last log line; a checkpoint has it, so that the next line is complete."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vembed_ds.distributed import comm
from vembed_ds.training.step_work import StepWork


@dataclass
class LogWindow:
    """Sums of this rank over the steps of one log line; tensors stay on the device until then.

    What is timed or counted of the work is of the steps that were made here, and not before the run
    was resumed.

    Attributes:
        loss: Sum of the losses.
        parts: The same of every part that a loss has.
        counts: Steps in the sum of each part: not every data set has all.
        summed: Steps in the sums; the others had no finite loss or gradient.
        skipped: Steps without an update.
        timed: Steps that were made here.
        pairs: Of this rank in them.
        started: When the first of them began; later by the time that was no training.
        waited: Seconds that they waited for data.
        work: What they embedded.
        pauses: Seconds that were no training, by what they were spent on.
    """

    loss: Tensor | float = 0.0
    parts: dict[str, Tensor | float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    summed: int = 0
    skipped: int = 0
    timed: int = 0
    pairs: int = 0
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    work: StepWork = field(default_factory=StepWork)
    pauses: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Add the loss of a step that is sound."""
        self.loss = self.loss + loss
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + part
            self.counts[name] = self.counts.get(name, 0) + 1
        self.summed += 1

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Time inside counts neither as training nor as waiting for data."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.started += seconds
            self.pauses[what] = self.pauses.get(what, 0.0) + seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the counts, and the sums of every rank. Collective."""
        own = {"loss": float(self.loss), "parts": {n: float(p) for n, p in self.parts.items()}}
        return {
            "summed": self.summed,
            "skipped": self.skipped,
            "counts": dict(self.counts),
            "ranks": comm.all_gather_objects(own),
        }


def resumed_window(state: Mapping[str, Any] | None) -> LogWindow:
    """The window where a checkpoint left it. Local.

    On another number of ranks everyone takes the mean, and the mean of all is what is logged.

    Args:
        state: From :meth:`LogWindow.state`; ``None``: of a fresh run, or an earlier version's.
    """
    if state is None:
        return LogWindow()
    ranks = state["ranks"]
    if len(ranks) == comm.world_size():
        own = ranks[comm.rank()]
    else:
        own = {
            "loss": _mean([rank["loss"] for rank in ranks]),
            "parts": {n: _mean([rank["parts"][n] for rank in ranks]) for n in ranks[0]["parts"]},
        }
    summed, skipped = (int(state[name]) for name in ("summed", "skipped"))
    # An earlier version had parts in every step or in none.
    counts = dict(state.get("counts") or dict.fromkeys(own["parts"], summed))
    return LogWindow(own["loss"], dict(own["parts"]), counts, summed=summed, skipped=skipped)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
