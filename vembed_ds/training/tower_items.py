"""What a frozen tower is given of data sets: every text, or image, once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from datasets import Dataset as Table
from datasets import Value
from torch.utils.data import Dataset

from vembed_ds.data.dataset import PairDataset, Sample
from vembed_ds.data.processors import ItemProcessor, image_key, text_key
from vembed_ds.data.records import Item
from vembed_ds.data.sampler import SampleKey
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.data.vector_table import KeyArray, VectorTable
from vembed_ds.data.workers import Samples
from vembed_ds.errors import DataError, VembedError
from vembed_ds.teachers.items import ITEMS, ItemDataset, distinct_contents


def missing_texts(
    members: Iterable[PairDataset], table: VectorTable, *, processor: ItemProcessor
) -> tuple[KeyArray, Samples]:
    """The texts that a table lacks, as they are encoded: behind their instructions. Local.

    Args:
        members: The data sets; every rank reads all of them, column by column.
        table: Keyed by :func:`text_key`.
        processor: Of the tower.

    Returns:
        Keys ``[N]``, ascending, and the N texts.

    Raises:
        DataError: Two texts cannot be told apart by their hashes.
    """
    texts = _distinct_texts(members)
    keys = np.array([text_key(text) for text in texts], dtype=np.int64)
    if not (keys[1:] > keys[:-1]).all():
        raise DataError(
            "two different texts have the same hash, so one would get the other's features; set "
            "cache_frozen_encoder: false"
        )
    missing = ~table.has(keys)
    kept = [texts[place] for place in np.flatnonzero(missing)]
    return keys[missing], _Texts(kept, processor)


def missing_images(
    members: Sequence[PairDataset], table: VectorTable, *, processor: ItemProcessor
) -> tuple[KeyArray, Samples]:
    """The images that a table lacks, also those of items that have a text too. Collective.

    Every image file is read once, to know what it holds. Contents are told apart by 64-bit hashes;
    two of 10^8 have the same one with probability 3e-4.

    Args:
        members: The data sets; the ranks share their records.
        table: Keyed by :func:`image_key`.
        processor: Of the tower.

    Returns:
        Keys ``[N]``, ascending, and the N images.

    Raises:
        DataError: On every rank, when a record or an image file cannot be read.
    """
    read: dict[str, int] = {}  # many records may name one file

    def key_of(item: Item) -> int:
        assert item.image is not None
        if not isinstance(item.image, str):
            return image_key(item.image)
        if item.image not in read:
            read[item.image] = image_key(item.image)
        return read[item.image]

    distinct = distinct_contents(
        members,
        lambda item: item.image is not None,
        lambda role, items: np.fromiter(map(key_of, items), dtype=np.int64),
    )
    missing = distinct.where(~table.has(distinct.keys))
    images = _Images(members, missing.addresses, processor=processor, instructions=Instructions())
    return missing.keys, images


class _Images(ItemDataset):
    """Of items that are both, the image only."""

    def as_read(self, item: Item, *, role: str) -> Item:
        return Item(image=item.image)


class _Texts(Dataset[Sample | VembedError]):
    def __init__(self, texts: Sequence[str], processor: ItemProcessor) -> None:
        self._texts, self._processor = texts, processor

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, key: SampleKey | int) -> Sample | VembedError:
        index = key.index if isinstance(key, SampleKey) else key
        item = Item(text=self._texts[index])
        try:
            encoded = self._processor.encode(item, origin=repr(item.text), augment_seed=None)
        except VembedError as error:
            return error
        return Sample(index, roles={ITEMS: [encoded]}, keys={ITEMS: []})


def _distinct_texts(members: Iterable[PairDataset]) -> list[str]:
    """In the order of their keys."""
    found: set[str] = set()
    for member in members:
        for role, column in member.reader.columns_of("text"):
            instruction = member.reader.instruction(role)
            found.update(instruction + text for text in _texts(member.table, column))
    return sorted(found, key=text_key)


def _texts(table: Table, column: str) -> set[str]:
    """The texts of a column; of negatives, lists of them."""
    if isinstance(table.features[column], Value):
        values = table.unique(column)
    else:
        values = chain.from_iterable(cell or () for cell in table[column])
    return {text for text in values if isinstance(text, str) and text.strip()}
