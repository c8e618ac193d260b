"""The map-style dataset: one row in, one encoded sample out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

import datasets
import numpy as np
from torch.utils.data import Dataset

from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.records import Record, RecordReader
from vembed_ds.data.sampler import SampleKey
from vembed_ds.errors import DataError, VembedError

ROLES = ("query", "positive")


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded pair: row number, and ``query`` and ``positive`` by role."""

    index: int
    roles: dict[str, EncodedItem]


class PairDataset(Dataset[Sample | VembedError]):
    """Reads, decodes and encodes pairs on demand.

    Args:
        table: Memory-mapped table; only the reader's columns are kept.
        reader: Turns rows into records.
        processor: Encodes items.
        seed: Run seed, >= 0; seeds augmentation together with epoch, row and role.
    """

    def __init__(
        self, table: datasets.Dataset, *, reader: RecordReader, processor: ItemProcessor, seed: int
    ) -> None:
        self.table = table.select_columns(reader.columns)
        self.reader = reader
        self.processor = processor
        self.seed = seed
        self.roles: tuple[str, ...] = ROLES

    def only(self, role: str) -> Self:
        """The same rows, of which only ``role`` is encoded."""
        view = copy.copy(self)
        view.roles = (role,)
        return view

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.table.num_rows)

    def record(self, index: int) -> Record:
        """The record of one row, not decoded.

        Raises:
            DataError: When a value of the row is unusable.
        """
        try:
            row = self.table[index]
        except UnicodeDecodeError as error:  # Arrow checks texts only when they are read
            raise DataError(
                f"{self.reader.origin}, record {index}: {error}; save the file as UTF-8"
            ) from error
        return self.reader.read(row, index)

    def __getitem__(self, key: SampleKey | int) -> Sample | VembedError:
        """Encodes one row; a ``SampleKey`` augments images, a plain row number does not.

        An error of ours is returned instead of raised: a ``DataLoader`` would re-raise it as
        text of another type, and on one rank only, while the others wait. ``collate`` passes
        it on, so that all ranks can agree to stop.
        """
        try:
            return self._encoded(key)
        except VembedError as error:
            return error

    def _encoded(self, key: SampleKey | int) -> Sample:
        index, epoch = (key.index, key.epoch) if isinstance(key, SampleKey) else (key, None)
        record = self.record(index)
        roles = {
            role: self.processor.encode(
                getattr(record, role),
                origin=f"{self.reader.origin}, record {index}, {role}",
                augment_seed=None
                if epoch is None
                else augmentation_seed(self.seed, epoch=epoch, index=index, role=role),
            )
            for role in self.roles
        }
        return Sample(index, roles)


def augmentation_seed(seed: int, *, epoch: int, index: int, role: str) -> int:
    """Mixes what identifies one look at one item into a seed.

    Args:
        seed: Run seed, >= 0.
        epoch: Epoch, >= 0.
        index: Row number, >= 0.
        role: ``query`` or ``positive``.

    Returns:
        A 64-bit seed, the same in every process and release of numpy.
    """
    words = [seed, epoch, index, int.from_bytes(role.encode(), "little")]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
