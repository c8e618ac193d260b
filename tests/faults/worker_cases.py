"""What a rank of a test world runs: a training that loses its loader process."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any
from unittest import mock

from tests.distributed.train_cases import run_train
from vembed_ds.distributed import comm
from vembed_ds.training.loop import TrainingLoop


def train_robbed(*, rank: int, **run: Any) -> dict[str, Any]:
    """A training in which the loader processes of ``rank`` are killed behind the second step."""
    killed_at = 0.0
    log = TrainingLoop.log

    def robbed(self: TrainingLoop, *args: Any, **kwargs: Any) -> None:
        nonlocal killed_at
        log(self, *args, **kwargs)
        if self.step == 2 and comm.rank() == rank:
            for process in multiprocessing.active_children():
                process.kill()
            killed_at = time.monotonic()

    with mock.patch.object(TrainingLoop, "log", robbed):
        result = run_train(**run)
    return {**result, "seconds_since_kill": time.monotonic() - killed_at}
