"""F4 under the real launchers: whoever gets the signal, the run ends with a checkpoint and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import verify
from tests.distributed.conftest import tiny_config
from tests.distributed.test_train import losses_of
from tests.faults.checkpoints_alike import require_same_checkpoints
from tests.faults.punished import Punished, nothing_left, train
from tests.integration.launching import PROGRAMS, ROOT, run_command

STEPS = 100
SECONDS = 240  # for a start, some steps and an end

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.distributed(2),
    pytest.mark.timeout(5 * SECONDS),
]

CHANGES: dict[str, Any] = {"max_steps": STEPS, "val_data_path": None, "gradient_self_test": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path, pairs: Path) -> Path:
    """The folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config(folder, model=clip_folder, pairs=pairs, **CHANGES)
    done = run_command(under_torchrun(config), seconds=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out"


@pytest.fixture
def make_run(make_config: Callable[..., str], tmp_path: Path) -> Callable[..., Punished]:
    """The run of a command that is made of the configuration's path."""

    def make(command: Callable[[str], list[str]], **changes: object) -> Punished:
        config = make_config(**CHANGES, **changes)
        return Punished(command(config), folder=tmp_path / "of-run", output=tmp_path / "out")

    return make


def under_torchrun(config: str) -> list[str]:
    command = train(config)
    port, arguments = command[4], command[7:]
    words = ["--nproc_per_node", "2", "--master_port", port, "--module", "vembed_ds.train"]
    return [str(PROGRAMS / "torchrun"), *words, *arguments]


# Whom a signal goes to, what the launcher ends with, and what the ranks say of it.
LAUNCHER, RANK, CTRL_C = "launcher", "rank 1", "Ctrl-C"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        pytest.param(
            under_torchrun,
            {
                LAUNCHER: (1, "SIGTERM on rank"),
                RANK: (1, "SIGTERM on rank 1"),
                CTRL_C: (1, "SIGINT on rank"),
            },
            id="torchrun",
        ),
        pytest.param(
            train,
            {
                LAUNCHER: (-signal.SIGTERM, "the end of the launcher of rank"),
                RANK: (75, "SIGTERM on rank 1"),
                CTRL_C: (-signal.SIGINT, "SIGINT on rank"),
            },
            id="deepspeed",
        ),
    ],
)
def test_a_signalled_run_stops_and_goes_on_bitwise(
    make_run: Callable[..., Punished],
    whole: Path,
    command: Callable[[str], list[str]],
    expected: Mapping[str, tuple[int, str]],
) -> None:
    run = make_run(command, num_workers=1)  # launchers signal loader processes too
    with nothing_left(run):
        for whom, (code, cause) in expected.items():
            with launched(run) as (process, told):
                signal_to(whom, run, process)
                assert process.wait(SECONDS) == code
                wait_for_the_end(run)
                assert told.read_text().splitlines()[-1] == "exit 75"
            require_stopped(run, cause)
        done = run_command(run.command, seconds=SECONDS)
        assert done.returncode == 0, done.stderr[-3000:]
    require_same(run.output, whole)


def test_the_restart_loop_stops_when_asked_and_starts_again_when_not(
    make_run: Callable[..., Punished], whole: Path
) -> None:
    run = make_run(train)
    with nothing_left(run):
        loop = run.start()
        try:
            wait_until_it_trains(run, loop)
            loop.terminate()
            assert loop.wait(SECONDS) == 75
            require_stopped(run, "SIGTERM on rank 0")
            assert "restart 1" not in run.log.read_text()

            loop = run.start()
            wait_until_it_trains(run, loop)
            os.kill(run.processes()["rank 1"][0], signal.SIGKILL)
            assert loop.wait(SECONDS) == 0, run.log.read_text()[-3000:]
            assert "restart 1 of 9 (a newer checkpoint counts anew)" in run.log.read_text()
        finally:
            end(run, loop)
    require_same(run.output, whole)


@contextmanager
def launched(run: Punished) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The launcher of a run that trains, and the file in which a rank tells its exit code."""
    told = run.folder / "vembed-status-of-the-test"
    with run.log.open("wb") as log:
        process = subprocess.Popen(
            run.command,
            cwd=ROOT,
            env=run.environment | {"VEMBED_STATUS_FILE": str(told)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until_it_trains(run, process)
        yield process, told
    finally:
        end(run, process)
        told.unlink(missing_ok=True)


def signal_to(whom: str, run: Punished, process: subprocess.Popen[bytes]) -> None:
    if whom == CTRL_C:
        os.killpg(process.pid, signal.SIGINT)
    elif whom == LAUNCHER:
        process.terminate()
    else:
        os.kill(run.processes()[whom][0], signal.SIGTERM)


def wait_until_it_trains(run: Punished, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + SECONDS
    while not run.trains():
        assert process.poll() is None, run.log.read_text()[-3000:]
        assert time.monotonic() < limit, run.log.read_text()[-3000:]
        time.sleep(0.1)


def wait_for_the_end(run: Punished) -> None:
    limit = time.monotonic() + SECONDS
    while run.processes():
        assert time.monotonic() < limit, run.processes()
        time.sleep(0.2)


def end(run: Punished, process: subprocess.Popen[bytes]) -> None:
    """What is left, when a test fails."""
    if process.poll() is None:
        process.kill()
        process.wait()
    for number in (number for found in run.processes().values() for number in found):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def require_stopped(run: Punished, cause: str) -> None:
    """It said why it stopped, and its newest checkpoint is whole and of its last step."""
    checkpoint = run.output / (run.output / "latest").read_text()
    step = verify(checkpoint).step
    said = run.log.read_text()
    assert f"stopped by {cause}" in said, said[-3000:]
    assert f"at step {step}, checkpoint {checkpoint}: to go on" in said, said[-3000:]
    lines = (run.output / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step < STEPS


def require_same(output: Path, whole: Path) -> None:
    assert losses_of(output) == losses_of(whole)
    last = f"checkpoint-step-{STEPS}"
    verify(output / last)
    require_same_checkpoints(output / last, whole / last)
