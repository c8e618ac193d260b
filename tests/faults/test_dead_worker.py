"""F32: a loader process that the system kills ends every rank within seconds, and is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.test_train import ds_file
from tests.worlds import World
from vembed_ds.command import EXIT_UNEXPECTED, exit_code
from vembed_ds.errors import WorkerError

pytestmark = [pytest.mark.faults]


def test_a_killed_loader_process_ends_a_training(
    world: Callable[[int], World], make_config: Callable[..., str]
) -> None:
    config = make_config(
        num_workers=1, prefetch_factor=1, max_steps=50, val_data_path=None, eval_on_start=False
    )
    healthy, robbed = world(2).run(
        "tests.faults.worker_cases:train_robbed", rank=1, config=config, ds_config=ds_file(2)
    )
    assert robbed["error"].startswith("WorkerError: loader process 1 of 1 (pid ")
    assert "was killed by SIGKILL, which is often the system being out of memory" in robbed["error"]
    cause = robbed["error"].removeprefix("WorkerError: ")
    assert healthy["error"] == f"DistributedError: rank 1 failed: {cause}"
    assert robbed["seconds_since_kill"] < 10
    assert exit_code(WorkerError(cause)) == EXIT_UNEXPECTED  # starting again may help
