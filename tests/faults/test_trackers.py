"""F31: the real wandb without a server. Its stand-in is in tests/unit/tracking/test_trackers.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("wandb") is None, reason="needs the extra wandb"),
]

RUN = """
import logging, sys
logging.basicConfig()
from vembed_ds.tracking.trackers import build_tracker
tracker = build_tracker("wandb", folder=sys.argv[1], run_name="r", config={"lr": 1.0})
for step in (1, 2, 3):
    tracker.log({"train/loss": step / 10}, step=step)
tracker.close()
"""


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Log three steps in a process that has no network, not even this machine's own."""
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let a process leave the network (unshare --net)")
    variables = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        [*alone, sys.executable, "-c", RUN, str(folder)],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_offline_wandb_keeps_a_run_of_its_own(tmp_path: Path) -> None:
    done = run(tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == [1, 2, 3]
    (kept,) = (tmp_path / "wandb").glob("offline-run-*")
    assert any(kept.glob("*.wandb"))


def test_wandb_that_reaches_no_server_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    """An error at the start, with the remedy; not a run whose curves nobody has."""
    done = run(tmp_path, WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_INIT_TIMEOUT="5")
    assert done.returncode == 1
    assert "ConfigError: report_to=wandb: wandb cannot start (" in done.stderr
    assert "set WANDB_MODE=offline" in done.stderr
