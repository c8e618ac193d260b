"""What a rank of a test world watches of its training loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

from tests.distributed.train_cases import run_train
from tests.syncs import SyncWatch
from vembed_ds.data.collators import Batch
from vembed_ds.training.loop import TrainingLoop


def watch_steps(**options: Any) -> dict[str, Any]:
    """:func:`run_train`; what waited in its steps but the first and the last, and how many these were.

    The run writes log lines after those two only. Watched is a step from its batch to the next
    batch's request.
    """
    found: Counter[tuple[str, str, str]] = Counter()
    watched = 0
    batches = TrainingLoop.batches

    def watching(self: TrainingLoop) -> Iterator[Batch]:
        nonlocal watched
        for batch in batches(self):
            if self.step == 0 or self.step == self.intervals.num_steps - 1:
                yield batch
                continue
            with SyncWatch() as watch:
                yield batch
            found.update(watch.found)
            watched += 1

    with mock.patch.object(TrainingLoop, "batches", watching):
        return run_train(**options) | {"found": dict(found), "watched": watched}
