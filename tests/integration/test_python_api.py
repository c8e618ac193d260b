"""The Python API in a plain process: nothing is left behind, and every way to call it trains the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import pairs, tiny_config  # noqa: F401 (a fixture)
from tests.faults.checkpoints_alike import require_same_checkpoints
from tests.integration.launching import run_command

SCRIPT = Path(__file__).with_name("api_script.py")
SECONDS = 240


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory,
    clip_folder: Path,
    pairs: Path,  # noqa: F811
) -> tuple[dict[str, Any], Path, str]:
    """What the script saw, its folder, and what it wrote to standard error."""
    folder = tmp_path_factory.mktemp("api")
    config = tiny_config(folder, model=clip_folder, pairs=pairs, eval_steps=2)
    done = run_command([sys.executable, str(SCRIPT), config, str(folder)], seconds=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), folder, done.stderr


def test_importing_the_package_imports_no_torch(ran: tuple[dict[str, Any], Path, str]) -> None:
    assert ran[0]["imported"] == []


def test_every_way_to_call_it_trains_the_same(ran: tuple[dict[str, Any], Path, str]) -> None:
    seen, folder, _ = ran
    assert {"eval/recall@1", "eval/mrr"} <= seen["first"].keys()
    for name in ("again", "loop", "thread", "resumed"):
        assert seen[name] == seen["first"], name
    for name in ("again", "loop", "thread", "stopped"):
        found = folder / name / "checkpoint-step-4"
        require_same_checkpoints(found, folder / "first" / "checkpoint-step-4")
    assert seen["zero3"] == pytest.approx(seen["first"], rel=1e-4)
    assert seen["complete"] == {}, "nothing is left to train"


def test_the_process_is_as_before(ran: tuple[dict[str, Any], Path, str]) -> None:
    seen = ran[0]
    assert seen["before"]["torch threads"] == 3
    assert seen["before"]["variables"] == []
    for name in ("first", "again", "zero3", "stopped", "broken", "thread"):
        assert seen["states"][name] == seen["before"], name


def test_ctrl_c_ends_it_with_a_checkpoint(ran: tuple[dict[str, Any], Path, str]) -> None:
    seen, folder, _ = ran
    assert seen["stopped"] == (
        "StoppedError: stopped by SIGINT on rank 0 at step 2, checkpoint "
        f'{folder / "stopped" / "checkpoint-step-2"}: to go on, call train(resume="auto")'
    )


def test_what_the_callback_gets(ran: tuple[dict[str, Any], Path, str]) -> None:
    seen, folder, errors = ran
    lines = [
        json.loads(line) for line in (folder / "first" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [{"step": step, **metrics} for step, metrics in seen["logged"]] == lines
    assert "on_log failed; training goes on" in errors
    assert "ValueError: a mistake in the callback" in errors


def test_lines_are_shown_where_nobody_configured_logging(
    ran: tuple[dict[str, Any], Path, str],
) -> None:
    assert "INFO step 4 of 4: loss " in ran[2]


def test_what_is_wrong_is_one_error(ran: tuple[dict[str, Any], Path, str]) -> None:
    seen, folder, _ = ran
    assert seen["broken"].startswith(f"DataError: {folder / 'bad.jsonl'} (retrieval_mode=t2i)")
    assert not (folder / "broken").exists()
    assert seen["beside"] == (
        "ConfigError: train: another training runs in this process, in another thread; wait for its "
        "end, or start a process for each"
    )
    assert not (folder / "beside").exists()


def test_the_encoder_is_the_exported_model(ran: tuple[dict[str, Any], Path, str]) -> None:
    seen = ran[0]
    assert seen["rows"][0] == seen["rows"][1]
    assert not [name for name in seen["left"] if name.startswith(".encoder")]
