"""``vembed-ds train`` on this machine through the real launcher: a signal, and what it ends with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import verify
from tests.distributed.conftest import make_config, pairs
from tests.distributed.test_train import ds_file, losses_of
from tests.integration.launching import ROOT, run_command

__all__ = ["make_config", "pairs"]

SECONDS = 200
LONG = {"max_steps": 3000, "val_data_path": None, "eval_steps": 0, "save_steps": 20}

pytestmark = [pytest.mark.slow, pytest.mark.distributed(2)]


def train(config: str, *more: str) -> list[str]:
    flags = ["--num_gpus", "2", "--ds_config", ds_file(2), "--config", config]
    return [sys.executable, "-m", "vembed_ds", "train", *flags, *more]


def test_it_waits_for_the_ranks_and_ends_with_their_code(
    make_config: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = train(make_config(**LONG))
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)
    started = time.monotonic()
    while not (out / "latest").exists():
        assert running.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() - started < SECONDS
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(timeout=SECONDS) == 75
    said = (tmp_path / "log").read_text()
    assert "vembed-ds: asking the ranks to stop with a checkpoint" in said
    assert re.search(r"rank 0: stopped by SIGTERM .*at step \d+, checkpoint ", said), said[-3000:]
    assert "Traceback" not in said
    # It was over when the command was over.
    newest = verify(out / (out / "latest").read_text()).step
    assert newest == max(losses_of(out))


def test_a_mistake_that_ranks_find_is_2(make_config: Callable[..., str], tmp_path: Path) -> None:
    done = run_command(train(make_config(lr="fast")), seconds=SECONDS)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "rank 0: ConfigError: lr='fast'" in done.stderr
    assert "rank 1: ConfigError: lr='fast'" in done.stderr
