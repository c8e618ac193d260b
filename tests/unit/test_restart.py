"""``launch/restart.sh`` with commands that only end in some way; no training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "restart.sh"
RESUME = ["--resume", "auto"]

pytestmark = pytest.mark.faults


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VEMBED_RESTART_SECONDS", "0")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def attempts(folder: Path, *bodies: str) -> list[str]:
    """A command whose n-th attempt runs the n-th body, and the last one from then on."""
    for number, body in enumerate(bodies):
        (folder / f"{number}.sh").write_text(body)
    (folder / "command.sh").write_text(
        f"cd {folder}; echo >> count; n=$(($(wc -l < count) - 1))\n"
        f"[ -f $n.sh ] || n={len(bodies) - 1}\n. ./$n.sh\n"
    )
    return ["bash", str(folder / "command.sh"), *RESUME]


def count(folder: Path) -> int:
    return len((folder / "count").read_text().splitlines())


def start(most: int | str, command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), str(most), *command],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def restart(most: int | str, command: Sequence[str]) -> tuple[int, str]:
    process = start(most, command)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def leave(code: int, *, tell: bool = True) -> str:
    return (f"echo exit {code} >> $VEMBED_STATUS_FILE\n" if tell else "") + f"exit {code}\n"


@pytest.mark.parametrize("code", [0, 2, 75])
def test_what_is_not_started_again(folder: Path, code: int) -> None:
    assert restart(3, attempts(folder, leave(code)))[0] == code
    assert count(folder) == 1
    assert not list(folder.glob("vembed-status-*"))


@pytest.mark.parametrize("body", [leave(1), "exit 247\n", "kill -KILL $$\n", leave(1, tell=False)])
def test_what_is_started_again_until_it_is_done(folder: Path, body: str) -> None:
    code, said = restart(3, attempts(folder, body, body, leave(0)))
    assert (code, count(folder)) == (0, 3)
    assert "restart 2 of 3 (a newer checkpoint counts anew), in " in said


def test_the_number_of_restarts_in_vain(folder: Path) -> None:
    code, said = restart(2, attempts(folder, "exit 247\n"))
    assert (code, count(folder)) == (247, 3)
    assert "2 restarts have not brought it to a newer checkpoint: giving up" in said


def test_a_newer_checkpoint_counts_anew_and_an_old_one_does_not(folder: Path) -> None:
    bodies = [f"echo saved {step} >> $VEMBED_STATUS_FILE\n{leave(1)}" for step in (2, 9, 10, 10)]
    code, said = restart(1, attempts(folder, *bodies))
    # After steps 2, 9 and 10 there is one restart each; the one after 10 came no further.
    assert (code, count(folder)) == (1, 4)
    assert said.count("restart 1 of 1 (a newer checkpoint counts anew), in ") == 3


def test_what_a_rank_said_counts_and_not_what_the_launcher_made_of_it(folder: Path) -> None:
    for code in (0, 2, 75):
        command = attempts(folder, f"echo exit {code} >> $VEMBED_STATUS_FILE\nexit 1\n")
        assert restart(3, command)[0] == code


@pytest.mark.parametrize("end", ["exit 0", "kill -KILL $$", "kill -TERM $$"])
def test_ranks_that_stopped_because_their_launcher_was_killed(folder: Path, end: str) -> None:
    body = f"echo exit 75 >> $VEMBED_STATUS_FILE\n{end}\n"
    code, said = restart(3, attempts(folder, body, leave(0)))
    assert (code, count(folder)) == (0, 2)
    assert "the launcher was killed; the ranks noticed and stopped" in said


def test_a_launcher_that_ends_with_0_is_not_believed(folder: Path) -> None:
    code, said = restart(3, attempts(folder, "exit 0\n", leave(0)))
    assert (code, count(folder)) == (0, 2)
    assert "ended with 0, but no rank said that the run is complete" in said


def test_what_is_refused(folder: Path) -> None:
    code, said = restart(3, ["true"])
    assert code == 2
    assert "no --resume auto, so that every restart would begin again; add it" in said
    code, said = restart(3, ["true", "--resume", "output/my"])
    assert code == 2
    code, said = restart("three", ["true", *RESUME])
    assert code == 2
    assert "usage: bash launch/restart.sh N COMMAND..." in said
    code, said = restart(3, ["no-such-program", *RESUME])
    assert code == 127
    assert "cannot be started" in said


def test_nothing_of_an_attempt_outlives_it(folder: Path) -> None:
    """Also in a session of its own, as torchrun's ranks are."""
    orphan = "setsid sleep 60 & echo $! > orphan; exit 1\n"
    # A zombie, which nobody may collect in a container, has no command line.
    alive = "[ -z \"$(tr -d '\\0' < /proc/$(cat orphan)/cmdline)\" ] || exit 2\n" + leave(0)
    code, said = restart(3, attempts(folder, orphan, alive))
    assert code == 0, said
    assert "killing what is left of the run" in said


# A rank that says whom to signal, and a launcher that SIGTERM would end.
RANK = """
import os, signal, sys, time
def stop(*_):
    open("asked", "w").close()
    time.sleep(1)
    open(os.environ["VEMBED_STATUS_FILE"], "a").write(f"exit {code}\\n")
    os._exit(code)
code = int(sys.argv[1])
signal.signal(signal.SIGTERM, stop)
open(os.environ["VEMBED_STATUS_FILE"], "a").write(f"pid {os.uname().nodename} {os.getpid()}\\n")
open("up", "w").close()
time.sleep(30)
"""


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_a_rank_and_waits_for_it(folder: Path, number: signal.Signals) -> None:
    (folder / "rank.py").write_text(RANK)
    process = start(3, attempts(folder, f"{sys.executable} rank.py 75; exit $?\n"))
    wait_for(folder / "up")
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert (folder / "asked").exists()
    assert f"{number.name}: asking the run to stop with a checkpoint" in said
    assert count(folder) == 1


def test_a_signal_before_training_ends_everything(folder: Path) -> None:
    process = start(3, attempts(folder, "setsid sleep 60 & echo $! > up; wait\n"))
    wait_for(folder / "up")
    time.sleep(0.2)
    sleeper = int((folder / "up").read_text())
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    command_line = Path(f"/proc/{sleeper}/cmdline")
    assert not command_line.exists() or not command_line.read_text()  # or nobody collected it


def test_a_signal_between_two_attempts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEMBED_RESTART_SECONDS", "60")
    process = start(3, attempts(folder, "echo > up; exit 1\n"))
    wait_for(folder / "up")
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=10)
    assert (process.returncode, count(folder)) == (75, 1)


def test_a_signal_between_two_attempts_hits_nobody_who_has_a_ranks_number_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEMBED_RESTART_SECONDS", "60")
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        told = f"echo pid $(uname -n) {stranger.pid} >> $VEMBED_STATUS_FILE\n"
        process = start(3, attempts(folder, f"{told}echo > up; exit 1\n"))
        wait_for(folder / "up")
        time.sleep(1)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=10)
        assert (process.returncode, count(folder)) == (75, 1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_third_signal_kills_what_does_not_end(folder: Path) -> None:
    (folder / "rank.py").write_text(
        "import signal\nsignal.signal(15, signal.SIG_IGN)\n"
        + RANK.replace("time.sleep(1)", "time.sleep(60)")
    )
    process = start(3, attempts(folder, f"trap '' TERM; {sys.executable} rank.py 75\n"))
    wait_for(folder / "up")
    for _ in range(3):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.7)
    process.communicate(timeout=10)
    assert process.returncode == 75
