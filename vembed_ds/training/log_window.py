"""What was seen since the last log line; a checkpoint has it, so that the next line is complete."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vembed_ds.distributed import comm


@dataclass
class LogWindow:
    """Sums of this rank over the steps of one log line; tensors stay on the device until then.

    Attributes:
        loss: Sum of the losses.
        parts: The same of every part that a loss has.
        summed: Steps in the sums; the others had no finite loss or gradient.
        skipped: Steps without an update.
        timed: Steps that were made here, and not before the run was resumed.
        started: When the first of them began.
        waited: Seconds that they waited for data.
    """

    loss: Tensor | float = 0.0
    parts: dict[str, Tensor | float] = field(default_factory=dict)
    summed: int = 0
    skipped: int = 0
    timed: int = 0
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0

    def add(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Add the loss of a step that is sound."""
        self.loss = self.loss + loss
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + part
        self.summed += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the counts, and the sums of every rank. Collective."""
        own = {"loss": float(self.loss), "parts": {n: float(p) for n, p in self.parts.items()}}
        return {
            "summed": self.summed,
            "skipped": self.skipped,
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
    counts = {name: int(state[name]) for name in ("summed", "skipped")}
    return LogWindow(loss=own["loss"], parts=dict(own["parts"]), **counts)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
