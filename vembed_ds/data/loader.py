"""Batches from worker processes, set up so that results never depend on their number."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from vembed_ds.data.collators import Batch, collate, join
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.mixture import Mixture
from vembed_ds.data.sampler import SampleKey

Keys = Sequence[SampleKey] | Sequence[int]

# Items that a worker prepares at a time. A batch for the gradient cache may be thousands of
# images: in parts, all workers share one batch instead of holding a whole one each.
PART_SIZE = 32


class BatchLoader:
    """Iterates over one rank's batches, in the order of ``batches``.

    Iterating does not touch torch's default random state.

    Args:
        dataset: The pairs.
        batches: The keys of every batch: ``SampleKey`` for training, row numbers for evaluation
            (never augmented). Iterated twice at a time, so not an iterator.
        num_workers: Worker processes; 0 encodes in this process.
        prefetch_factor: Batches that the workers together prepare ahead.
    """

    def __init__(
        self,
        dataset: PairDataset | Mixture,
        batches: Iterable[Keys],
        *,
        num_workers: int,
        prefetch_factor: int,
    ) -> None:
        self._batches = batches
        # Before the fork: tokenizers else print a warning in each worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._parts: DataLoader[Batch] = DataLoader(
            dataset,  # type: ignore[arg-type]  # collate turns samples into a Batch
            batch_sampler=_Parts(batches),
            collate_fn=collate,
            num_workers=num_workers,
            prefetch_factor=_parts_ahead(batches, prefetch_factor, num_workers),
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yields whole batches."""
        parts = iter(self._parts)
        for keys in self._batches:
            yield join([next(parts) for _ in range(_num_parts(keys))])


class _Parts:
    """The keys of all batches, cut into parts; sampler of the workers."""

    def __init__(self, batches: Iterable[Keys]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Any]]:
        for keys in self._batches:
            for start in range(0, len(keys), PART_SIZE):
                yield list(keys[start : start + PART_SIZE])


def _num_parts(keys: Keys) -> int:
    return -(-len(keys) // PART_SIZE)


def _parts_ahead(batches: Iterable[Keys], prefetch_factor: int, num_workers: int) -> int | None:
    """What torch calls ``prefetch_factor``: per worker, and in parts."""
    if not num_workers:
        return None
    first = next(iter(batches), ())
    return max(1, -(-prefetch_factor * _num_parts(first) // num_workers))


def _start_worker(_worker_id: int) -> None:
    """Keeps a worker to one core; the default would start one thread per core in each."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
