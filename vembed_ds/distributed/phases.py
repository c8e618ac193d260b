"""What this rank is doing now, in words: for messages about hangs, dead ranks and memory.

Only the main thread's phases are kept, and any thread may read them. Entering one costs a few
microseconds: no lock, and the device is never asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What the work of a phase is, for those who must tell phases apart and not only name them."""

    LOADING = "loading"
    BUILDING = "building the engine"
    DATA = "waiting for data"
    EMBEDDING = "embedding"
    LOSS = "loss"
    REPLAY = "replaying"
    REDUCTION = "reducing the gradient"
    OPTIMIZER = "optimizer step"
    TEACHER = "asking the teachers"
    EVALUATION = "evaluation"
    SAVING = "saving"
    WAITING = "waiting for the other ranks"
    OTHER = "other"


class Phase(NamedTuple):
    """One phase.

    Attributes:
        kind: What its work is.
        words: How messages name it, such as ``"embedding chunk 3 of 8"``.
    """

    kind: Kind
    words: str


class Status(NamedTuple):
    """What a rank is doing.

    Attributes:
        place: Where in the run, such as ``"step 12"``.
        phases: From the outermost to the innermost.
        changes: How often this has changed since the process began.
        since: ``time.monotonic()`` of the last change.
    """

    place: str
    phases: tuple[Phase, ...]
    changes: int
    since: float

    def __str__(self) -> str:
        return ": ".join([self.place, *(phase.words for phase in self.phases)])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of all phases, from the outermost."""
        return tuple(phase.kind for phase in self.phases)


_status = Status("start", (), 0, time.monotonic())
_AT = "_vembed_status"  # where an exception keeps what was being done when it was raised


def current() -> Status:
    """What the main thread of this rank is doing."""
    return _status


def set_place(place: str) -> None:
    """Say where in the run this rank is, such as ``"step 12"``."""
    _change(place, _status.phases)


@contextmanager
def phase(kind: Kind, words: str = "") -> Iterator[None]:
    """Say that what happens inside is a phase; phases may nest.

    An exception that leaves it remembers where it was raised, see :func:`status_of`.

    Args:
        kind: What its work is.
        words: How messages name it; the kind's own words by default.
    """
    outer = _status.phases
    _change(_status.place, (*outer, Phase(kind, words or kind.value)))
    try:
        yield
    except BaseException as error:
        if _is_main_thread() and not hasattr(error, _AT):
            setattr(error, _AT, _status)
        raise
    finally:
        _change(_status.place, outer)


def status_of(error: BaseException) -> Status:
    """What this rank was doing when ``error``, or what caused it, was raised."""
    found: BaseException | None = error
    status = _status
    while found is not None:
        status = getattr(found, _AT, status)
        found = found.__cause__ or found.__context__
    return status


def _change(place: str, phases: tuple[Phase, ...]) -> None:
    global _status
    if _is_main_thread():
        # One assignment: a thread that reads meanwhile sees the old status or the new one.
        _status = Status(place, phases, _status.changes + 1, time.monotonic())


def _is_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident
