"""Progress bars of rank 0."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from vembed_ds.distributed import comm

PATIENCE_SECONDS = 2.0  # shorter work shows no progress bar
LOG_SECONDS = 30.0  # between two lines of it where nobody watches

T = TypeVar("T")


@contextmanager
def progress(total: int, *, what: str) -> Iterator[tqdm[Any]]:
    """A bar of rank 0, of work that takes longer than two seconds."""
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        disable=not comm.is_main(),
        delay=PATIENCE_SECONDS,
        mininterval=0.5 if terminal else LOG_SECONDS,
    ) as bar:
        yield bar


def watched(rows: Sequence[T], *, what: str) -> Iterator[T]:
    """The rows one by one, with a bar as of :func:`progress` that counts those that are done."""
    with progress(len(rows), what=what) as bar:
        for row in rows:
            yield row
            bar.update()
