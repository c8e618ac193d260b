"""Stopping at a step boundary that all ranks agree on, when a signal asks for it on any of them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from vembed_ds.distributed import comm, launcher
from vembed_ds.distributed.launcher import Launcher
from vembed_ds.errors import StoppedError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ORPHANED = 1  # no signal has this number on the way here: SIGHUP is not listened to
_RANKS = 1 << 32  # more than there are; one integer travels, made of what came and to whom


class StopRequested(Exception):  # noqa: N818 (nothing failed)
    """The ranks agreed to stop before the next step.

    Args:
        cause: What asked for it, in words.
    """

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__(cause)


class StopSignals:
    """Listens to the signals that ask a run to stop; a context manager around the training loop.

    A signal only sets a flag. It travels in the reduction that the ranks make anyway before each
    step, and in evaluation before each batch, so that all stop at the same place. A signal that
    comes later changes nothing more. What the caller ignores, as ``nohup`` and the background jobs
    of a shell do, stays ignored. The handlers that were there before are put back at the end.

    Args:
        process_ends: This process does nothing else: behind a stop the signals stay ignored, so that
            none of them changes its exit code on the way out.
    """

    def __init__(self, *, process_ends: bool = False) -> None:
        self._process_ends = process_ends
        self._received: int | None = None
        self._repeated = False
        self._previous: dict[signal.Signals, Any] = {}
        self._launcher: Launcher | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "training in a thread: signals cannot be listened to, so they end this process "
                "without a checkpoint"
            )
            return self
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        self._launcher = Launcher()
        if signal.SIGTERM in self._previous:
            launcher.tell("pid", f"{os.uname().nodename} {os.getpid()}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = self._process_ends and isinstance(error, StoppedError)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if stopped else handler)
        self._previous.clear()

    def pending(self) -> bool:
        """Whether this rank was asked to stop."""
        if self._received is None and self._launcher is not None and self._launcher.gone:
            self._received = _ORPHANED
            _say("the launcher has ended")
        return self._received is not None

    def flag(self) -> int:
        """What this rank adds to the reduction, of which the maximum counts; 0: nothing came."""
        if not self.pending():
            return 0
        assert self._received is not None
        return self._received * _RANKS + comm.rank()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = number
            _say(signal.Signals(number).name)
        elif not self._repeated:
            self._repeated = True
            _write(f"vembed_ds: rank {comm.rank()}: already stopping\n")


def raise_agreed(flag: int) -> None:
    """Act on the maximum of all ranks' flags; the same on every rank.

    Raises:
        StopRequested: Any rank was asked to stop.
    """
    if not flag:
        return
    number, rank = divmod(flag, _RANKS)
    if number == _ORPHANED:
        raise StopRequested(f"the end of the launcher of rank {rank}")
    raise StopRequested(f"{signal.Signals(number).name} on rank {rank}")


def _say(cause: str) -> None:
    _write(
        f"vembed_ds: rank {comm.rank()}: {cause}: stopping before the next step, "
        "with a checkpoint\n"
    )


def _write(line: str) -> None:
    """Past all buffers: a handler may have interrupted a write into the same one."""
    with contextlib.suppress(OSError):  # a terminal that is gone must not disturb the stop
        os.write(2, line.encode())
