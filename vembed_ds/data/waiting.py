"""Waiting for another thread's answer, with a limit, and not for longer than anybody wants it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOOK_SECONDS = 0.5  # until a wait looks whether it is still wanted


class WaitInterrupted(Exception):  # noqa: N818 (nothing failed)
    """Nobody wants the answer any more."""


def never() -> bool:
    """For waits that only their limit ends."""
    return False


def take(
    answers: queue.Queue[T] | queue.SimpleQueue[T],
    *,
    timeout_seconds: float,
    interrupted: Callable[[], bool],
) -> T:
    """The next answer.

    Args:
        answers: Filled by another thread.
        timeout_seconds: Longest wait.
        interrupted: Whether the answer is not wanted any more; asked while there is none.

    Raises:
        queue.Empty: There was none in time.
        WaitInterrupted: It is not wanted any more.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = deadline - time.monotonic()
        try:
            return answers.get(timeout=max(0.0, min(left, LOOK_SECONDS)))
        except queue.Empty:
            if interrupted():
                raise WaitInterrupted from None
            if left <= LOOK_SECONDS:
                raise
