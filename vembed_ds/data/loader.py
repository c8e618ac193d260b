"""Batches from worker processes, set up so that results never depend on their number."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing

from vembed_ds.data.collators import Batch, collate, join
from vembed_ds.data.waiting import never
from vembed_ds.data.workers import Keys, Samples, WorkerPool, prepare_server

# Items that a worker prepares at a time. A batch for the gradient cache may be thousands of
# images: in parts, all workers share one batch instead of holding a whole one each.
PART_SIZE = 32

TIMEOUT_SECONDS = 900.0
ITEMS_PER_WORKER = 128  # fewer are encoded before another process has started


class BatchLoader:
    """Iterates over one rank's batches, in the order of ``batches``.

    Iterating does not touch torch's default random state. Workers live as long as an
    iteration; what is wrong with one arrives as the ``error`` of a batch.

    Args:
        dataset: The pairs.
        batches: The keys of every batch: ``SampleKey`` for training, ``StreamedRow`` where the data
            is streamed, row numbers for evaluation (never augmented).
        num_workers: Worker processes; 0 encodes in this process.
        prefetch_factor: Batches that the workers together prepare ahead.
        timeout_seconds: Longest wait for a worker; shorter than that of the other ranks.
        interrupted: Whether the batch is not wanted any more; asked while waiting for a worker.
            Iterating then raises :class:`WaitInterrupted`.

    Raises:
        ConfigError: When there are workers and the data set cannot be sent to them.
    """

    def __init__(
        self,
        dataset: Samples,
        batches: Iterable[Keys],
        *,
        num_workers: int,
        prefetch_factor: int,
        timeout_seconds: float = TIMEOUT_SECONDS,
        interrupted: Callable[[], bool] = never,
    ) -> None:
        self._dataset, self._batches = dataset, batches
        self._num_workers, self._prefetch_factor = num_workers, prefetch_factor
        self._timeout_seconds, self._interrupted = timeout_seconds, interrupted
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if num_workers:
            prepare_server(dataset)

    def __iter__(self) -> Iterator[Batch]:
        """Yields whole batches."""
        found: list[Batch] = []
        with closing(self._from_workers() if self._num_workers else self._from_here()) as parts:
            for part, is_last in parts:
                found.append(part)
                if is_last:
                    yield join(found)
                    found = []

    def _from_here(self) -> Generator[tuple[Batch, bool]]:
        for keys, is_last in _parts(self._batches):
            yield collate([self._dataset[key] for key in keys]), is_last

    def _from_workers(self) -> Generator[tuple[Batch, bool]]:
        batches = iter(self._batches)
        first = next(batches, ())
        parts = _parts(itertools.chain([first], batches))
        ahead = _parts_ahead(first, self._prefetch_factor, self._num_workers)
        submitted: deque[bool] = deque()  # of every part that is out, whether it is a batch's last
        with WorkerPool(
            self._dataset,
            num_workers=self._num_workers,
            timeout_seconds=self._timeout_seconds,
            interrupted=self._interrupted,
        ) as pool:

            def submit(number: int) -> None:
                for keys, is_last in itertools.islice(parts, number):
                    pool.submit(keys)
                    submitted.append(is_last)

            submit(ahead)
            while submitted:
                part = pool.result()
                submit(1)
                yield part, submitted.popleft()


def enough_workers(num_items: int, *, most: int) -> int:
    """Loader processes that are worth their start for so many items, at most ``most``."""
    return min(most, num_items // ITEMS_PER_WORKER)


def _parts(batches: Iterable[Keys]) -> Iterator[tuple[Keys, bool]]:
    """The keys of all batches, cut into parts, and whether each is its batch's last."""
    for keys in batches:
        for start in range(0, len(keys), PART_SIZE):
            yield keys[start : start + PART_SIZE], start + PART_SIZE >= len(keys)


def _parts_ahead(first: Keys, prefetch_factor: int, num_workers: int) -> int:
    """Parts that are prepared ahead, by all workers together; each has one at least."""
    return max(num_workers, prefetch_factor * -(-len(first) // PART_SIZE))
