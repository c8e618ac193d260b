"""F37: random kills and signals; the final weights are those of an undisturbed run.

Changed from the matrix: the 5 to 15 s are counted from where an attempt begins to train, because
a start takes longer than that here. For ten minutes of it:
``VEMBED_SOAK_SECONDS=600 python -m pytest tests/faults/test_soak.py --all -s``
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.test_train import losses_of
from tests.faults.checkpoints_alike import require_same_checkpoints
from tests.faults.punished import Punished, nothing_left, punish, train

SECONDS = float(os.environ.get("VEMBED_SOAK_SECONDS", "90"))
SEED = int(os.environ.get("VEMBED_SOAK_SEED", "0"))
STEPS_PER_SECOND = 2.5  # of the whole time, of which the larger part is spent on starting
LIMIT = 10 * SECONDS + 900

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.distributed(2),
    pytest.mark.timeout(LIMIT),
]


def test_random_kills_change_no_weight(make_config: Callable[..., str], tmp_path: Path) -> None:
    steps = max(60, int(SECONDS * STEPS_PER_SECOND))

    def command(name: str) -> list[str]:
        config = make_config(
            f"{name}.yaml",
            output_dir=str(tmp_path / name),
            max_steps=steps,
            save_steps=10,
            save_total_limit=3,
            num_workers=1,
            val_data_path=None,
            gradient_self_test=False,
            timeout_minutes=1,
        )
        return train(config)

    clean = Punished(command("clean"), folder=tmp_path / "of-clean", output=tmp_path / "clean")
    assert clean.start().wait(timeout=LIMIT / 2) == 0, clean.log.read_text()[-5000:]

    run = Punished(
        command("punished"), folder=tmp_path / "of-punished", output=tmp_path / "punished"
    )
    started = time.monotonic()
    with nothing_left(run):
        done = punish(run, seconds=SECONDS, seed=SEED)
    report = {"seconds": round(time.monotonic() - started), "steps": steps, **done}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert any(what.startswith("SIG") for what in done), report
    print("soak:", json.dumps(report))  # noqa: T201 (seen with -s)
    require_same_checkpoints(
        tmp_path / "punished" / f"checkpoint-step-{steps}",
        tmp_path / "clean" / f"checkpoint-step-{steps}",
    )
    assert losses_of(tmp_path / "punished") == losses_of(tmp_path / "clean")
