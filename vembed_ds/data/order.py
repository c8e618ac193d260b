"""Which records make each global batch: a pure function of (data, seed, step).

Neither the number of ranks nor that of workers enters, so a run that is resumed on other
hardware sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from vembed_ds.errors import DataError

IndexArray = np.ndarray[Any, np.dtype[np.int64]]


def permutation(number: int, words: Sequence[int]) -> IndexArray:
    """An order of ``number`` things.

    Sorts raw generator output, because numpy keeps that stable over its releases and
    ``Generator.permutation`` not.

    Args:
        number: How many.
        words: Non-negative numbers that seed it.

    Returns:
        ``[number]`` int64, read-only.
    """
    bits = np.random.PCG64(np.random.SeedSequence(list(words))).random_raw(number)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


class Order:
    """The global batches of a run over one or more data sets.

    An epoch takes ``weight`` times a data set's records: 2 sees them twice, 0.5 every second
    epoch. Whole passes, so that no record is seen again before all others were.

    Args:
        sizes: Records of each data set; records are numbered through, one data set behind the
            other.
        weights: Passes over each data set per epoch, > 0; ``None``: one each.
        global_batch_size: Records per step over all ranks.
        seed: Run seed, >= 0.
        homogeneous: Every batch comes from one data set; else they mix.
        keys: For every record, numbers for its contents: no batch then holds one of them twice.
            ``None``: batches are cut without looking.
        names: Of the data sets, for messages.

    Raises:
        DataError: A data set, or all together, do not fill one global batch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        global_batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        homogeneous: bool = False,
        keys: Sequence[Sequence[int]] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.homogeneous = homogeneous
        self.keys = keys
        self._offsets = np.cumsum([0, *sizes])
        self._numbers = [
            max(1, round(weight * size))
            for weight, size in zip(weights or [1.0] * len(sizes), sizes, strict=True)
        ]
        self._names = list(names or [f"data set {place}" for place in range(len(sizes))])
        self._check()
        # Not a method's cache, which would keep the data set alive.
        self._epoch = lru_cache(maxsize=1)(self._batches_of_epoch)

    def _check(self) -> None:
        whole = self._names if self.homogeneous else [""]
        numbers = self._numbers if self.homogeneous else [sum(self._numbers)]
        for name, number in zip(whole, numbers, strict=True):
            if number < self.global_batch_size:
                place = f"{name}: " if name else ""
                raise DataError(
                    f"{place}{number} records do not fill one global batch of "
                    f"{self.global_batch_size} (batch_size x ranks); lower batch_size, use fewer "
                    "ranks or add data"
                )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; what remains is dropped."""
        if self.homogeneous:
            return sum(number // self.global_batch_size for number in self._numbers)
        return sum(self._numbers) // self.global_batch_size

    def batch(self, step: int) -> tuple[int, IndexArray]:
        """The records of one global step.

        Args:
            step: Global step, from 0, counted over epochs.

        Returns:
            The epoch, and ``[global_batch_size]`` int64 record numbers.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        batches: IndexArray = self._epoch(epoch)
        return epoch, batches[place]

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache, which does not pickle."""
        return {name: value for name, value in vars(self).items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With an empty cache."""
        vars(self).update(state)
        self._epoch = lru_cache(maxsize=1)(self._batches_of_epoch)

    def _batches_of_epoch(self, epoch: int) -> IndexArray:
        records = [self._records(place, epoch) for place in range(len(self.sizes))]
        if not self.homogeneous:
            slots = np.concatenate(records)
            return self._cut(slots[permutation(len(slots), [self.seed, epoch])])
        cut = [
            self._cut(slots[permutation(len(slots), [self.seed, epoch, place])])
            for place, slots in enumerate(records)
        ]
        batches = np.concatenate(cut)
        turned: IndexArray = batches[permutation(len(batches), [self.seed, epoch, len(cut)])]
        return turned

    def _records(self, place: int, epoch: int) -> IndexArray:
        """A data set's records of an epoch, not yet shuffled; passes go on over epochs."""
        size, number = self.sizes[place], self._numbers[place]
        if number % size == 0:
            found = np.tile(np.arange(size), number // size)
        else:
            positions = np.arange(epoch * number, (epoch + 1) * number)
            passes = range(positions[0] // size, positions[-1] // size + 1)
            orders = [permutation(size, [self.seed, turn, place, 1]) for turn in passes]
            found = np.concatenate(orders)[positions - passes[0] * size]
        numbered: IndexArray = (found + self._offsets[place]).astype(np.int64)
        return numbered

    def _cut(self, records: IndexArray) -> IndexArray:
        number = len(records) // self.global_batch_size
        if self.keys is None:
            return records[: number * self.global_batch_size].reshape(number, -1)
        return _without_duplicates(
            records, number=number, size=self.global_batch_size, keys=self.keys
        )


def _without_duplicates(
    records: IndexArray, *, number: int, size: int, keys: Sequence[Sequence[int]]
) -> IndexArray:
    """Cut into batches whose records share no key; what would clash waits for a later batch.

    The last batches may lack records that fit; they take some again that the epoch has used.
    """
    waiting, batches = records.tolist(), []
    for _ in range(number):
        batch, waiting = _draw(waiting, size, keys, [])
        if len(batch) < size:
            batch, _ = _draw(records.tolist(), size, keys, batch)
        if len(batch) < size:
            raise DataError(
                f"no_duplicates: at most {len(batch)} records share no query, positive or negative, "
                f"and a global batch has {size} (batch_size x ranks); lower batch_size, or set "
                "no_duplicates: false"
            )
        batches.append(batch)
    return np.array(batches, dtype=np.int64)


def _draw(
    records: Sequence[int], size: int, keys: Sequence[Sequence[int]], batch: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Fill ``batch`` up from the front of ``records``; the batch, and what was not taken."""
    chosen = list(batch)
    used = {key for record in chosen for key in keys[record]}
    left: list[int] = []
    for place, record in enumerate(records):
        if len(chosen) == size:
            left.extend(records[place:])
            break
        if used.isdisjoint(keys[record]):
            chosen.append(record)
            used.update(keys[record])
        else:
            left.append(record)
    return chosen, left
