"""Progress bars of rank 0."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from vembed_ds.distributed import comm

PATIENCE_SECONDS = 2.0  # shorter work shows no progress bar
LOG_SECONDS = 30.0  # between two lines of it where nobody watches


@contextmanager
def progress(total: int, *, what: str) -> Iterator[tqdm[Any]]:
    """A bar of rank 0, of work that takes longer than two seconds."""
    watched = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        disable=not comm.is_main(),
        delay=PATIENCE_SECONDS,
        mininterval=0.5 if watched else LOG_SECONDS,
    ) as bar:
        yield bar
