"""Whether the launcher of a rank is still there, with programs of the launchers' names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vembed_ds.distributed.launcher import Launcher, tell

ROOT = Path(__file__).parents[3]
# As `deepspeed` does: a program that starts a module that starts the rank.
START = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])\n"
RANK = """
import time
from vembed_ds.distributed.launcher import Launcher
launcher = Launcher()
print("up", launcher.gone, flush=True)
while not launcher.gone:
    time.sleep(0.02)
print("gone", flush=True)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    (tmp_path / "deepspeed").write_text(START)
    (tmp_path / "torchrun").write_text(START)
    (tmp_path / "bash").write_text(START)
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path


def start(folder: Path, *names: str) -> subprocess.Popen[str]:
    paths = [str(folder / name) for name in (*names, "rank.py")]
    return subprocess.Popen(
        [sys.executable, "-u", *paths],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def child(process: int) -> int:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(children[0])


@pytest.mark.parametrize(
    ("names", "killed"), [(["torchrun"], 0), (["deepspeed", "torchrun"], 0), (["deepspeed"] * 2, 1)]
)
def test_the_end_of_any_process_of_the_launcher_is_noticed(
    programs: Path, names: list[str], killed: int
) -> None:
    with start(programs, *names) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up False\n"
        os.kill(child(process.pid) if killed else process.pid, signal.SIGKILL)
        assert process.stdout.readline() == "gone\n"


def test_a_shell_that_started_the_launcher_may_end(programs: Path) -> None:
    with start(programs, "bash", "torchrun") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up False\n"
        launcher = child(process.pid)
        process.kill()
        os.set_blocking(process.stdout.fileno(), False)
        time.sleep(0.5)
        assert not process.stdout.readline()
        os.set_blocking(process.stdout.fileno(), True)
        os.kill(launcher, signal.SIGKILL)
        assert process.stdout.readline() == "gone\n"


def test_without_a_launcher_nothing_is_gone() -> None:
    assert not Launcher().gone


def test_a_file_that_cannot_be_written_ends_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VEMBED_STATUS_FILE", str(tmp_path / "gone" / "status"))
    tell("saved", 1)
    tell("exit", 0)
    (record,) = caplog.records
    assert f"VEMBED_STATUS_FILE={tmp_path / 'gone' / 'status'}: cannot be written (No such" in (
        record.getMessage()
    )
    monkeypatch.setenv("VEMBED_STATUS_FILE", "/dev/full")
    tell("exit", 0)
    assert "No space left on device" in caplog.text
