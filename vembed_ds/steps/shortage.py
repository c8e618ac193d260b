"""Memory that runs out in the middle of a step, on one rank or on several."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from vembed_ds.errors import DistributedError

# How the accelerator, its libraries, torch's host allocator and the system say it.
_SAID = re.compile(r"out of memory|can.t allocate memory|cannot allocate memory|ALLOC_FAILED", re.I)

E = TypeVar("E", bound=BaseException)

Agree = Callable[[BaseException | None], None]
"""Called by every rank at the same points of a step, with its own shortage; raises on all or none."""


class MemoryShortage(Exception):  # noqa: N818 (the step is made again)
    """Memory ran out on some rank, and all have left the step; its gradient is to be dropped.

    Args:
        cause: On this rank; ``None``: on another one.
        kept: Whether any rank kept more graphs than one.
        largest: Items of a stream in the largest chunk.
    """

    def __init__(self, cause: BaseException | None, *, kept: bool, largest: int) -> None:
        super().__init__(cause)
        self.cause, self.kept, self.largest = cause, kept, largest


@contextmanager
def may_run_out(agree: Agree | None) -> Iterator[None]:
    """Work that ends for all ranks when memory runs out on one; other errors pass at once.

    Collective with ``agree``: the work itself must need no other rank.

    Args:
        agree: Called at its end; ``None``: whatever runs out passes as it is.
    """
    if agree is None:
        yield
        return
    shortage: BaseException | None = None
    try:
        yield
    except Exception as error:
        if memory_cause(error) is None:
            raise
        shortage = emptied(error)
    agree(shortage)


def memory_cause(error: BaseException) -> BaseException | None:
    """The error, or its cause, that says that there is no memory; ``None``: there is none."""
    if isinstance(error, DistributedError):  # another rank's
        return None
    return next((found for found in _chain(error) if _says_so(found)), None)


def emptied(error: E) -> E:
    """The same error, without the variables on its stack: they keep the tensors of the step.

    To drop the stack is not enough while context managers that the error leaves look at it.
    """
    for found in _chain(error):
        traceback.clear_frames(found.__traceback__)
    return error


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_SAID.search(str(error)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
