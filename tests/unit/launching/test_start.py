"""Signals and exit codes, with a launcher that only pretends to have ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from vembed_ds.errors import ConfigError
from vembed_ds.launching import start

# Says what a rank says, waits for SIGTERM where it is asked to, and ends with a code or a signal.
LAUNCHER = """\
import os, platform, signal, sys, time
told, code = sys.argv[1:3]
def write(line):
    with open(os.environ["VEMBED_STATUS_FILE"], "a") as file:
        file.write(line + "\\n")
def stop(number, frame):
    write("exit 75")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
if "wait" in sys.argv:
    write(f"pid {platform.node()} {os.getpid()}")
    time.sleep(30)
if "ignore" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    write("pid elsewhere 1")
    time.sleep(30)
if told != "nothing":
    write(f"exit {told}")
if int(code) < 0:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), -int(code))
sys.exit(int(code))
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``launch(told, code)``: what is made of a launcher that ends with ``code``, whose rank told ``told``."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    monkeypatch.delenv("VEMBED_STATUS_FILE", raising=False)

    def run(*words: str, by_ssh: bool = False) -> int:
        command = [sys.executable, str(tmp_path / "launcher.py"), *words]
        with mock.patch.object(start, "launcher_command", return_value=command):
            return start.launch("vembed_ds.train", [], flags={}, by_ssh=by_ssh)

    return run


@pytest.mark.parametrize(
    ("told", "code", "found"),
    [
        ("0", "0", 0),
        ("75", "75", 75),
        ("75", "1", 75),  # torchrun makes 1 of everything
        ("1", "247", 1),  # another rank was killed
        ("nothing", "3", 3),
        ("nothing", "2", 2),
        ("1", "2", 2),  # one rank's mistake is everybody's
        ("0", "1", 1),  # a later rank failed
        ("nothing", "0", 1),
        ("nothing", "-9", 137),
        ("75", "-15", 75),
    ],
)
def test_the_exit_code_is_what_the_ranks_said(
    launch: Callable[..., int], told: str, code: str, found: int
) -> None:
    assert launch(told, code) == found


def test_ranks_on_other_machines_say_nothing_here(
    launch: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch("nothing", "0", by_ssh=True) == 0
    assert launch("nothing", "255", by_ssh=True) == 1
    assert "the connection to a machine broke" in capfd.readouterr().err


def test_a_status_file_that_is_given_is_used(
    launch: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEMBED_STATUS_FILE", str(tmp_path / "status"))
    launch("0", "0")
    assert (tmp_path / "status").read_text() == "exit 0\n"


def interrupt_when(waits: Callable[[], bool], *numbers: signal.Signals) -> threading.Thread:
    def run() -> None:
        for number in numbers:
            while not waits():
                time.sleep(0.02)
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_a_rank_and_what_it_says_counts(
    launch: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    status = tmp_path / "status"
    status.touch()
    monkeypatch.setenv("VEMBED_STATUS_FILE", str(status))
    before = signal.getsignal(number)
    thread = interrupt_when(lambda: "pid" in status.read_text(), number)
    assert launch("0", "0", "wait") == 75
    thread.join()
    assert signal.getsignal(number) == before


def test_who_does_not_listen_is_killed_by_the_third_signal(
    launch: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.touch()
    monkeypatch.setenv("VEMBED_STATUS_FILE", str(status))
    thread = interrupt_when(lambda: "pid" in status.read_text(), *[signal.SIGINT] * 3)
    assert launch("nothing", "0", "ignore") == 137
    thread.join()


def test_ranks_hear_of_their_machines_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-o ServerAliveInterval=1")
    script = (
        "import os; print(open(os.environ['DS_ENV_FILE']).read()); "
        "print(os.environ['PDSH_SSH_ARGS_APPEND'])"
    )
    command = [sys.executable, "-c", script]
    out = tmp_path / "out"
    real = subprocess.Popen

    def to_file(*args: object, **kwargs: object) -> object:
        with out.open("w") as file:
            return real(*args, **kwargs, stdout=file)  # type: ignore[call-overload]

    with (
        mock.patch.object(start, "launcher_command", return_value=command),
        mock.patch.object(start.subprocess, "Popen", to_file),
    ):
        assert start.launch("m", [], flags={}, by_ssh=True) == 0
    assert "GLOO_SOCKET_IFNAME=eth7\n" in out.read_text()
    assert "-o ServerAliveInterval=1 -o BatchMode=yes -o ServerAliveInterval=15" in out.read_text()


def test_open_mpis_ranks_hear_where_they_meet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"import os, shutil; shutil.copy(os.environ['DS_ENV_FILE'], {str(out)!r})"
    command = [sys.executable, "-c", script]
    flags = {"launcher": "OpenMPI", "master_addr": "a"}
    with mock.patch.object(start, "launcher_command", return_value=command):
        assert start.launch("m", [], flags=flags, by_ssh=True) == 0
        assert {"MASTER_ADDR=a", "MASTER_PORT=29500"} <= set(out.read_text().splitlines())
        start.launch("m", [], flags={**flags, "master_port": 7}, by_ssh=True)
        assert "MASTER_PORT=7\n" in out.read_text()


def test_a_folder_that_shells_take_apart_is_refused_where_one_is_used(
    launch: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(ConfigError, match=r"folder .*/a b: ' ' does not come through pdsh"):
        launch("0", "0", by_ssh=True)
    assert launch("0", "0") == 0


def test_a_signal_while_the_launcher_is_made_is_not_lost(
    launch: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen

    def interrupted(*args: object, **kwargs: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(start.subprocess, "Popen", interrupted)
    started = time.monotonic()
    assert launch("0", "0", "wait") in (75, 143)  # it may not listen yet
    assert time.monotonic() - started < 20


def test_a_terminal_that_is_gone_keeps_nobody_from_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(start.os, "write", gone)
    start._say("stopping")


def test_the_command_that_is_started() -> None:
    command = start.launcher_command(
        "vembed_ds.train", ["a b"], flags={"num_gpus": 2}, by_ssh=False
    )
    assert command[1:] == [
        *("-m", "deepspeed.launcher.runner", "--num_gpus=2", "--no_local_rank"),
        *("--log_level=error", "--module", "vembed_ds.train", "a b"),
    ]
    by_ssh = start.launcher_command("m", ["100%"], flags={}, by_ssh=True)
    assert by_ssh[-1] == "100%%"
    paths = {"venv_script": "/a b/100%", "enable_each_rank_log": "logs"}
    by_ssh = start.launcher_command("m", [], flags=paths, by_ssh=True)
    assert {"--venv_script='/a b/100%%'", "--enable_each_rank_log=logs"} < set(by_ssh)
    by_mpi = start.launcher_command("m", ["100%"], flags={"launcher": "OpenMPI"}, by_ssh=True)
    assert by_mpi[-1] == "100%"
