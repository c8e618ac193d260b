"""Queries, or documents, of one or several data sets: one list of items to embed."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import datasets
from torch.utils.data import Dataset

from vembed_ds.data.columns import IMAGE, TEXT, Part, listed
from vembed_ds.data.dataset import PairDataset, Sample
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import Item, Record, RecordReader
from vembed_ds.errors import DataError, VembedError

TITLE = "title"


class ItemList(Dataset[Sample | VembedError]):
    """Items of one role, numbered through; picklable.

    Args:
        role: ``query`` or ``positive``.
        sources: Data sets, each with the records whose item of this role is in the list.
    """

    def __init__(self, role: str, sources: Sequence[tuple[PairDataset, Sequence[int]]]) -> None:
        self.role = role
        self._sources = [(dataset.only(role), records) for dataset, records in sources]
        self._ends = list(itertools.accumulate(len(records) for _, records in sources))

    def __len__(self) -> int:
        """Number of items."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Sample | VembedError:
        """An item, encoded; an error of ours is returned, see :class:`PairDataset`."""
        dataset, record = self._find(number)
        return dataset[record]

    def item(self, number: int) -> Item:
        """An item, not decoded.

        Raises:
            DataError: It cannot be used.
        """
        dataset, record = self._find(number)
        found = dataset.record(record)
        return found.query if self.role == "query" else found.positive

    @property
    def parts(self) -> set[Part]:
        """Whether any item may hold a text, an image, or both."""
        return {part for dataset, _ in self._sources for part in dataset.reader.parts}

    @property
    def has_texts(self) -> bool:
        """Whether any item may have a text."""
        return any(TEXT in dataset.reader.role_columns[self.role] for dataset, _ in self._sources)

    def place(self, number: int) -> str:
        """Its record, for messages."""
        dataset, record = self._find(number)
        return f"{dataset.reader.origin}, record {dataset.row_number(record)}"

    def select(self, numbers: Sequence[int]) -> Self:
        """Some of the items, in ascending order."""
        chosen: list[list[int]] = [[] for _ in self._sources]
        for number in numbers:
            source = bisect.bisect_right(self._ends, number)
            start = self._ends[source - 1] if source else 0
            chosen[source].append(self._sources[source][1][number - start])
        datasets_ = [dataset for dataset, _ in self._sources]
        return type(self)(self.role, list(zip(datasets_, chosen, strict=True)))

    def _find(self, number: int) -> tuple[PairDataset, int]:
        source = bisect.bisect_right(self._ends, number)
        start = self._ends[source - 1] if source else 0
        dataset, records = self._sources[source]
        return dataset, records[number - start]


class TitledReader(RecordReader):
    """Puts a document's title before its text, as BEIR does; one of the two may be blank."""

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [*super().columns, TITLE]

    def read(self, row: Mapping[str, Any], index: int) -> Record:
        """Reads one row."""
        column = self.role_columns["positive"][TEXT]
        joined = f"{row[TITLE] or ''} {row[column] or ''}".strip()
        return super().read({**row, column: joined}, index)


def open_items(
    table: datasets.Dataset,
    *,
    letter: str,
    columns: Mapping[Part, str],
    origin: str,
    processor: ItemProcessor,
    titled: bool = False,
    **options: Any,
) -> PairDataset:
    """A table that holds queries only, or documents only.

    Args:
        table: The table.
        letter: What they are, as in ``retrieval_mode``.
        columns: Column of the texts, and of the images.
        origin: Name of the data in messages.
        processor: Encodes items.
        titled: Whether a column ``title`` belongs to the text.
        options: Further ones of :class:`RecordReader`.

    Returns:
        Pairs of every item with itself; choose a role.

    Raises:
        DataError: A column is missing.
    """
    if missing := [name for name in columns.values() if name not in table.column_names]:
        raise DataError(
            f"{origin}: no column {missing[0]!r}; the columns are {listed(table.column_names)}; "
            "rename one"
        )
    mapping = {
        name: column
        for part, column in columns.items()
        for name in (("query", "positive") if part == TEXT else ("query_image", "positive_image"))
    }
    reader = (TitledReader if titled else RecordReader)(
        table.column_names,
        retrieval_mode=f"{letter}2{letter}",
        column_mapping=mapping,
        origin=origin,
        **options,
    )
    return PairDataset(table, reader=reader, processor=processor, seed=0)


def corpus_columns(pairs: RecordReader, names: Sequence[str]) -> dict[Part, str]:
    """Columns of further documents: as of the pairs' positives, or ``text`` and ``image``.

    Args:
        pairs: Reader of the pairs.
        names: Columns of the further documents.
    """
    own: dict[Part, str] = {TEXT: "text", IMAGE: "image"}
    return {
        part: column if column in names else own[part]
        for part, column in pairs.role_columns["positive"].items()
        if column in names or own[part] in names or pairs.letters["positive"] != "x"
    }
