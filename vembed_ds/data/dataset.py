"""Encoding of records, and the map-style dataset: one row in, one encoded sample out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import datasets
import numpy as np
from torch.utils.data import Dataset

from vembed_ds.data.images import open_image
from vembed_ds.data.processors import EncodedItem, ItemProcessor, content_key
from vembed_ds.data.records import Item, Record, RecordReader, content_number
from vembed_ds.data.sampler import SampleKey
from vembed_ds.data.teacher_items import TeacherItems
from vembed_ds.errors import DataError, VembedError

ROLES = ("query", "positive")
NEGATIVE = "negative"


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded record.

    Args:
        index: Row number.
        roles: ``query`` and ``positive``: one item; ``negative``: any number, where the data has
            negatives at all.
        keys: The content of each of these items as a 64-bit number, equal for equal content.
        label: Class, where the data has classes.
        score: Graded similarity, where the data has one.
        teacher_score: Of query and positive, where the data has a teacher's scores.
        negative_scores: The same of the negatives, one each.
        teacher_roles: For every teacher by name, the same items as in ``roles`` as it reads them.
        member: Number of its data set, where there are several.
    """

    index: int
    roles: dict[str, list[EncodedItem]]
    keys: dict[str, list[int]]
    label: int | None = None
    score: float | None = None
    teacher_score: float | None = None
    negative_scores: list[float] | None = None
    teacher_roles: dict[str, dict[str, list[EncodedItem]]] = field(default_factory=dict)
    member: int = 0


class PairEncoder:
    """Encodes records: what a table and a stream have in common.

    Args:
        reader: Turns rows into records.
        processor: Encodes items.
        seed: Run seed, >= 0; seeds augmentation together with epoch, row and role.
        max_negatives: Most negatives of one record; of more, others are drawn in every epoch.
            ``None``: all.
        read_files: In ``Sample.keys``, an image path counts as the bytes of its file.

    Attributes:
        teachers: By name; items are encoded for them too. Like ``read_files``, they may be set until
            a loader is iterated over, because its processes get a copy then.
    """

    def __init__(
        self,
        *,
        reader: RecordReader,
        processor: ItemProcessor,
        seed: int,
        max_negatives: int | None = None,
        read_files: bool = False,
    ) -> None:
        self.reader = reader
        self.processor = processor
        self.seed = seed
        self.max_negatives = max_negatives
        self.read_files = read_files
        self.teachers: Mapping[str, TeacherItems] = {}
        self.roles: tuple[str, ...] = (*ROLES, NEGATIVE) if reader.has_negatives else ROLES

    def encode(
        self, record: Record, *, index: int, number: int, epoch: int | None, origin: str
    ) -> Sample:
        """Encodes a record's items.

        Args:
            record: The record.
            index: Of the sample.
            number: Which record it is, for everything that is drawn.
            epoch: ``None``: nothing is augmented.
            origin: Name of the record in messages.

        Raises:
            VembedError: An item cannot be encoded.
        """
        record = self._drawn(record, number=number, epoch=epoch)
        items = {role: record.items[role] for role in self.roles}
        teachers = {name: t for name, t in self.teachers.items() if t.reads_in(epoch)}
        # Once for all who look at them. Their keys are those of the items as they stand in the data,
        # and so are those of an image's stored features.
        looked_at = _opened(items, origin=origin) if teachers else items
        own = items if "image" in self.processor.stored else looked_at
        roles = self._encode_roles(own, number=number, epoch=epoch, origin=origin)
        augmented = epoch is not None and self.processor.augmentation is not None
        scores = record.negative_scores
        return Sample(
            index,
            roles=roles,
            keys={role: [self._key(item) for item in found] for role, found in items.items()},
            label=record.label,
            score=record.score,
            teacher_score=record.teacher_score,
            negative_scores=None if scores is None else list(scores),
            teacher_roles={
                name: roles
                if teacher.shared and not augmented
                else teacher.encode(looked_at, origin=origin)
                for name, teacher in teachers.items()
            },
        )

    def _encode_roles(
        self,
        items: Mapping[str, Sequence[Item]],
        *,
        number: int,
        epoch: int | None,
        origin: str,
    ) -> dict[str, list[EncodedItem]]:
        return {
            role: [
                self.processor.encode(
                    item,
                    origin=f"{origin}, {role}",
                    augment_seed=self._augment_seed(role, number, place, epoch=epoch),
                )
                for place, item in enumerate(found)
            ]
            for role, found in items.items()
        }

    def _key(self, item: Item) -> int:
        return content_number(content_key(item, read_files=self.read_files).encode())

    def _drawn(self, record: Record, *, number: int, epoch: int | None) -> Record:
        """The record with at most ``max_negatives`` negatives, and their scores."""
        total, limit = len(record.negatives), self.max_negatives
        if limit is None or total <= limit:
            return record
        seed = item_seed(self.seed, epoch=epoch or 0, index=number, role=NEGATIVE)
        chosen = np.argsort(np.random.PCG64(seed).random_raw(total), kind="stable")[:limit]
        places, scores = sorted(chosen), record.negative_scores
        return replace(
            record,
            negatives=tuple(record.negatives[place] for place in places),
            negative_scores=None if scores is None else tuple(scores[place] for place in places),
        )

    def _augment_seed(self, role: str, number: int, place: int, *, epoch: int | None) -> int | None:
        if epoch is None:
            return None
        name = role if place == 0 else f"{role} {place}"
        return item_seed(self.seed, epoch=epoch, index=number, role=name)


class PairDataset(PairEncoder, Dataset[Sample | VembedError]):
    """Reads, decodes and encodes records on demand.

    Args:
        table: Memory-mapped table; only the reader's columns are kept.
        reader: Turns rows into records.
        processor: Encodes items.
        seed: Run seed, >= 0.
        max_negatives: Most negatives of one record; ``None``: all.
        read_files: As of :class:`PairEncoder`.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        *,
        reader: RecordReader,
        processor: ItemProcessor,
        seed: int,
        max_negatives: int | None = None,
        read_files: bool = False,
    ) -> None:
        super().__init__(
            reader=reader,
            processor=processor,
            seed=seed,
            max_negatives=max_negatives,
            read_files=read_files,
        )
        self.table = table.select_columns(reader.columns)
        self._rows: Sequence[int] = range(table.num_rows)

    def only(self, role: str) -> Self:
        """The same rows, of which only ``role`` is encoded."""
        view = copy.copy(self)
        view.roles = (role,)
        return view

    def without(self, rows: Collection[int]) -> Self:
        """All rows but these."""
        view = copy.copy(self)
        view._rows = [row for row in self._rows if row not in rows]
        return view

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def row_number(self, index: int) -> int:
        """Number of a record's row in the table, which has those too that are left out."""
        return self._rows[index]

    def record(self, index: int) -> Record:
        """A record, not decoded; it has the number of its row in the table.

        Raises:
            DataError: When a value of the row is unusable.
        """
        number = self._rows[index]
        try:
            row = self.table[number]
        except UnicodeDecodeError as error:  # Arrow checks texts only when they are read
            raise DataError(
                f"{self.reader.origin}, record {number}: {error}; save the file as UTF-8"
            ) from error
        return self.reader.read(row, number)

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
        return self.encode(
            record,
            index=index,
            number=record.index,
            epoch=epoch,
            origin=f"{self.reader.origin}, record {record.index}",
        )


def _opened(items: Mapping[str, Sequence[Item]], *, origin: str) -> dict[str, list[Item]]:
    """The items with their images decoded."""
    return {
        role: [
            item
            if item.image is None
            else replace(item, image=open_image(item.image, origin=f"{origin}, {role}"))
            for item in found
        ]
        for role, found in items.items()
    }


def item_seed(seed: int, *, epoch: int, index: int, role: str) -> int:
    """Mixes what identifies one look at one item into a seed, of its augmentation for example.

    Args:
        seed: Run seed, >= 0.
        epoch: Epoch, >= 0.
        index: Row number, >= 0.
        role: ``query``, ``positive`` or ``negative``, and which of several.

    Returns:
        A 64-bit seed, the same in every process and release of numpy.
    """
    words = [seed, epoch, index, int.from_bytes(role.encode(), "little")]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
