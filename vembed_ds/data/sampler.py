"""The order of the samples: a pure function of (number of records, seed, step).

Neither the number of ranks nor that of workers enters, so a run that is resumed on other
hardware sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Sampler

from vembed_ds.errors import ConfigError, DataError

T = TypeVar("T")
IndexArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What the sampler hands to the dataset: a row, and the epoch that seeds augmentation."""

    index: int
    epoch: int


@lru_cache(maxsize=1)
def epoch_permutation(num_records: int, *, seed: int, epoch: int) -> IndexArray:
    """The order of all records in one epoch.

    Sorts raw generator output, because numpy keeps that stable over its releases and
    ``Generator.permutation`` not.

    Args:
        num_records: Number of records.
        seed: Run seed, >= 0.
        epoch: Epoch, from 0.

    Returns:
        ``[num_records]`` int64, read-only.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_records)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_records: int, global_batch_size: int) -> int:
    """Number of whole global batches in an epoch; the incomplete last one is dropped.

    Raises:
        DataError: When the records do not fill one global batch.
    """
    if num_records < global_batch_size:
        raise DataError(
            f"{num_records} records do not fill one global batch of {global_batch_size} "
            "(batch_size x ranks); lower batch_size, use fewer ranks or add data"
        )
    return num_records // global_batch_size


def global_batch(
    num_records: int, global_batch_size: int, *, seed: int, step: int
) -> tuple[int, IndexArray]:
    """The records of one global step.

    Args:
        num_records: Number of records.
        global_batch_size: Pairs per step over all ranks.
        seed: Run seed, >= 0.
        step: Global step, from 0, counted over epochs.

    Returns:
        The epoch, and ``[global_batch_size]`` int64 record numbers.

    Raises:
        DataError: When the records do not fill one global batch.
    """
    epoch, batch = divmod(step, steps_per_epoch(num_records, global_batch_size))
    order = epoch_permutation(num_records, seed=seed, epoch=epoch)
    return epoch, order[batch * global_batch_size : (batch + 1) * global_batch_size]


def rank_slice(indices: Sequence[T] | IndexArray, *, rank: int, world_size: int) -> Any:
    """One rank's contiguous part of a global batch, of the same type as ``indices``.

    Raises:
        ConfigError: When the ranks do not divide the global batch.
    """
    if len(indices) % world_size:
        raise ConfigError(
            f"global batch of {len(indices)} pairs: {world_size} ranks do not divide it; "
            "choose a multiple of the number of ranks"
        )
    share = len(indices) // world_size
    return indices[rank * share : (rank + 1) * share]


class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """Yields this rank's share of each global batch.

    Args:
        num_records: Number of records.
        global_batch_size: Pairs per step over all ranks, a multiple of ``world_size``.
        rank: This rank.
        world_size: Number of ranks.
        seed: Run seed, >= 0.
        num_steps: Steps of the whole run; the last step yielded is ``num_steps - 1``.
        start_step: First step yielded; a resumed run passes the steps already made.

    Raises:
        ConfigError: When the ranks do not divide the global batch.
        DataError: When the records do not fill one global batch.
    """

    def __init__(
        self,
        num_records: int,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        num_steps: int,
        start_step: int = 0,
    ) -> None:
        steps_per_epoch(num_records, global_batch_size)
        rank_slice(range(global_batch_size), rank=rank, world_size=world_size)
        self.num_records = num_records
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.steps = range(start_step, num_steps)

    def __len__(self) -> int:
        """Number of batches that are still to come from ``start_step`` on."""
        return len(self.steps)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yields one list of keys per step."""
        for step in self.steps:
            epoch, indices = global_batch(
                self.num_records, self.global_batch_size, seed=self.seed, step=step
            )
            share = rank_slice(indices, rank=self.rank, world_size=self.world_size)
            yield [SampleKey(int(index), epoch) for index in share]


def shard_indices(num_records: int, *, rank: int, world_size: int) -> list[int]:
    """One rank's contiguous shard for evaluation, equally long on every rank.

    The last shards wrap around to the first records; ``drop_padding`` undoes that.

    Args:
        num_records: Number of records, > 0.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        ``ceil(num_records / world_size)`` record numbers.
    """
    share = -(-num_records // world_size)
    return [index % num_records for index in range(rank * share, (rank + 1) * share)]


def drop_padding(gathered: Sequence[T], *, num_records: int) -> Sequence[T]:
    """Removes the wrapped-around duplicates of ``shard_indices``.

    Args:
        gathered: Values or tensor rows of all ranks, concatenated in rank order.
        num_records: Number of records.

    Returns:
        The first ``num_records`` of them: one per record, in record order.
    """
    return gathered[:num_records]
