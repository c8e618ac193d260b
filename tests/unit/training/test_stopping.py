"""Signals in one process: what is listened to, what is said, what is put back."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vembed_ds.errors import StoppedError
from vembed_ds.training.stopping import SIGNALS, StopRequested, StopSignals, raise_agreed


def ours(number: int, frame: object) -> None:
    """A handler from before."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.signal(number, ours) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def cause(flag: int) -> str:
    with pytest.raises(StopRequested) as raised:
        raise_agreed(flag)
    return raised.value.cause


def test_the_first_signal_counts_and_a_further_one_is_mentioned_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with StopSignals() as signals:
        assert not signals.pending()
        raise_agreed(signals.flag())  # nothing came
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.pending()
        assert cause(signals.flag()) == "SIGUSR1 on rank 0"
    assert all(signal.getsignal(number) is ours for number in SIGNALS)
    assert capfd.readouterr().err.splitlines() == [
        "vembed_ds: rank 0: SIGUSR1: stopping before the next step, with a checkpoint",
        "vembed_ds: rank 0: already stopping",
    ]


def test_the_flag_of_a_high_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "70000")
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert cause(max(0, signals.flag())) == "SIGTERM on rank 70000"


def test_what_the_caller_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert not signals.pending()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("process_ends", "error", "left"),
    [
        (True, StoppedError("stopped"), signal.SIG_IGN),
        (False, StoppedError("stopped"), ours),  # the caller's process goes on
        (True, ValueError("step"), ours),
    ],
)
def test_behind_a_stop_a_command_hears_no_signal(
    process_ends: bool, error: Exception, left: object
) -> None:
    with pytest.raises(type(error)), StopSignals(process_ends=process_ends):
        raise error
    assert all(signal.getsignal(number) is left for number in SIGNALS)


def test_a_thread_cannot_listen_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def train() -> None:
        with StopSignals() as signals:
            assert signals.flag() == 0

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert "training in a thread: signals cannot be listened to" in caplog.text
    assert all(signal.getsignal(number) is ours for number in SIGNALS)


def test_whom_to_signal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEMBED_STATUS_FILE", str(tmp_path / "status"))
    with StopSignals():
        told = (tmp_path / "status").read_text()
        assert told == f"pid {os.uname().nodename} {os.getpid()}\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    with StopSignals():
        pass
    assert (tmp_path / "status").read_text() == told
