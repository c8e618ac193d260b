"""What the data holds, every content once: queries, documents, and which documents must not be negatives.

Shapes: R records, Q distinct queries, C distinct documents, P distinct pairs of query and positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from vembed_ds.data.dataset import PairDataset, Sample
from vembed_ds.data.processors import ItemProcessor, content_key
from vembed_ds.data.records import Item, content_number
from vembed_ds.data.sampler import SampleKey, own_share
from vembed_ds.distributed import comm
from vembed_ds.encoding.items import ITEMS, ItemTable
from vembed_ds.errors import DataError, VembedError
from vembed_ds.evaluation.search import Pairs

IntArray = npt.NDArray[np.int64]

QUERY, POSITIVE, NEGATIVE, CORPUS = range(4)  # kinds of places


class Lists(NamedTuple):
    """Numbers in lists, one list behind the other.

    Attributes:
        starts: ``[n + 1]``: list i is ``values[starts[i]:starts[i + 1]]``.
        values: All numbers.
    """

    starts: IntArray
    values: IntArray

    def of(self, wanted: IntArray) -> tuple[IntArray, IntArray]:
        """The numbers of some lists, and of each the place in ``wanted`` of its list."""
        first = self.starts[wanted]
        counts = self.starts[wanted + 1] - first
        lines = np.repeat(np.arange(len(wanted)), counts)
        places = np.arange(len(lines)) - np.repeat(np.cumsum(counts) - counts, counts)
        return lines, self.values[places + np.repeat(first, counts)]


def lists_of(numbers: IntArray, values: IntArray, *, length: int) -> Lists:
    """The distinct pairs of a list's number and a value, as ``length`` lists."""
    pairs = np.unique(np.stack([numbers, values], axis=1), axis=0)
    return Lists(np.searchsorted(pairs[:, 0], np.arange(length + 1)), pairs[:, 1])


class Excluded(NamedTuple):
    """What must not be a negative; a class of documents stands once, however many queries it has.

    Attributes:
        groups: For every query its own group, and those of its labels.
        documents: For every group its documents.
    """

    groups: Lists
    documents: Lists

    def pairs(self, queries: Sequence[int]) -> Pairs:
        """Of some queries, numbered through, with their documents; a pair may stand there twice."""
        lines, groups = self.groups.of(np.array(queries, dtype=np.int64))
        places, rows = self.documents.of(groups)
        return Pairs(torch.from_numpy(lines[places]), torch.from_numpy(rows))


@dataclass(frozen=True)
class Contents:
    """Every content once, in the order in which the data has them first.

    Attributes:
        queries: ``[Q, 3]``, where each distinct query stands first: kind, row, place in the row.
        documents: ``[C, 3]``, the same of the documents: positives, negatives, the further corpus.
        query_of: ``[R]``, the distinct query of each record.
        starts: ``[Q + 1]``: the positives of query q are ``positives[starts[q]:starts[q + 1]]``.
        positives: ``[P]``, rows of ``documents``.
        excluded: For every query the documents that are none of its negatives, whatever their score: its
            positives, those of its labels, and the one that holds the same as the query.
    """

    queries: IntArray
    documents: IntArray
    query_of: IntArray
    starts: IntArray
    positives: IntArray
    excluded: Excluded


def read_contents(dataset: PairDataset, corpus: ItemTable | None) -> Contents:
    """Read all records, without decoding them. Collective: the ranks share the records.

    Contents are told apart by 64-bit hashes, of image files by that of their bytes.

    Args:
        dataset: Pairs.
        corpus: Further documents.

    Raises:
        VembedError: On every rank, when a record or an image file cannot be read.
    """
    parts = comm.all_gather_objects(
        comm.run_together(lambda: _read(dataset, corpus), doing="reading the records")
    )
    read = _Read(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    queries, query_of = _distinct(read.queries)
    keys = np.concatenate([read.positives, read.negatives, read.corpus])
    places = np.concatenate(
        [
            _places(POSITIVE, len(read.positives)),
            np.insert(read.negative_places, 0, NEGATIVE, axis=1),
            _places(CORPUS, len(read.corpus)),
        ]
    )
    documents, document_of = _distinct(keys)
    positives = lists_of(query_of, document_of[: len(query_of)], length=len(queries))
    same = _same(read.queries[queries], keys[documents])
    return Contents(
        queries=_places(QUERY, len(read.queries))[queries],
        documents=places[documents],
        query_of=query_of,
        starts=positives.starts,
        positives=positives.values,
        excluded=_excluded(positives, same, query_of, document_of, read.labels),
    )


class _Read(NamedTuple):
    """Content keys; of this rank's share, or of everything."""

    queries: IntArray  # [R]
    positives: IntArray  # [R]
    labels: IntArray  # [R], or [0] where the data has none
    negatives: IntArray  # of all records, one behind the other
    negative_places: IntArray  # [..., 2]: record, place
    corpus: IntArray


def _read(dataset: PairDataset, corpus: ItemTable | None) -> _Read:
    known: dict[str, int] = {}  # of image files, which many records may name

    def key(item: Item, origin: str) -> int:
        path = item.image if isinstance(item.image, str) and item.text is None else None
        if path is not None and path in known:
            return known[path]
        try:
            found = content_number(content_key(item, read_files=True).encode())
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        if path is not None:
            known[path] = found
        return found

    queries, positives, labels, negatives, places = [], [], [], [], []
    for number in _share(len(dataset)):
        record, origin = dataset.record(number), f"{dataset.reader.origin}, record {number}"
        queries.append(key(record.query, f"{origin}, query"))
        positives.append(key(record.positive, f"{origin}, positive"))
        labels += [] if record.label is None else [record.label]
        negatives += [key(item, f"{origin}, negative") for item in record.negatives]
        places += [(number, place) for place in range(len(record.negatives))]
    rows = (
        []
        if corpus is None
        else [
            key(corpus.item(row), f"{corpus.origin}, record {row}") for row in _share(len(corpus))
        ]
    )
    return _Read(
        queries=np.array(queries, dtype=np.int64),
        positives=np.array(positives, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        negatives=np.array(negatives, dtype=np.int64),
        negative_places=np.array(places, dtype=np.int64).reshape(-1, 2),
        corpus=np.array(rows, dtype=np.int64),
    )


def _share(number: int) -> range:
    return own_share(number, rank=comm.rank(), world_size=comm.world_size())


def _places(kind: int, number: int) -> IntArray:
    rows = np.arange(number, dtype=np.int64)
    return np.stack([np.full_like(rows, kind), rows, np.zeros_like(rows)], axis=1)


def _distinct(keys: IntArray) -> tuple[IntArray, IntArray]:
    """Where each distinct key stands first, in that order, and for every key its place among them."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[inverse]


def _excluded(
    positives: Lists, same: IntArray, query_of: IntArray, document_of: IntArray, labels: IntArray
) -> Excluded:
    """Every query's own positives and what holds the same, and what its labels make positives."""
    num_queries = len(same)
    own = np.arange(num_queries)
    asking, answers = positives.of(own)
    there = np.flatnonzero(same >= 0)
    # Where there are labels every record has one; the first documents are the records' positives.
    names, label_of = np.unique(labels, return_inverse=True)
    label_of = label_of + num_queries
    documents = lists_of(
        np.concatenate([asking, there, label_of]),
        np.concatenate([answers, same[there], document_of[: len(labels)]]),
        length=num_queries + len(names),
    )
    groups = lists_of(
        np.concatenate([own, query_of[: len(labels)]]),
        np.concatenate([own, label_of]),
        length=num_queries,
    )
    return Excluded(groups, documents)


def _same(query_keys: IntArray, document_keys: IntArray) -> IntArray:
    """The document that holds the same as each query, -1 where there is none."""
    row_of = {key: row for row, key in enumerate(document_keys.tolist())}
    return np.array([row_of.get(key, -1) for key in query_keys.tolist()], dtype=np.int64)


class PlacedItems(Dataset[Sample | VembedError]):
    """Encodes the items at some places; every sample has the one role ``ITEMS``.

    Args:
        dataset: Pairs.
        corpus: Further documents.
        places: ``[n, 3]`` of :class:`Contents`.
        processor: Of the model that embeds them.
        instruction: That the model reads before them.
    """

    def __init__(
        self,
        dataset: PairDataset,
        corpus: ItemTable | None,
        places: IntArray,
        *,
        processor: ItemProcessor,
        instruction: str,
    ) -> None:
        self._dataset, self._corpus, self._places = dataset, corpus, places
        self._processor, self._instruction = processor, instruction

    def __len__(self) -> int:
        """Number of items."""
        return len(self._places)

    def __getitem__(self, key: SampleKey | int) -> Sample | VembedError:
        """One item; an error is returned, as in ``PairDataset``."""
        index = key.index if isinstance(key, SampleKey) else key
        kind, row, place = (int(value) for value in self._places[index])
        try:
            item, origin = self._item(kind, row, place)
            item = replace(item, instruction=self._instruction)
            encoded = self._processor.encode(item, origin=origin, augment_seed=None)
        except VembedError as error:
            return error
        return Sample(index, roles={ITEMS: [encoded]}, keys={ITEMS: []})

    def _item(self, kind: int, row: int, place: int) -> tuple[Item, str]:
        if kind == CORPUS:
            assert self._corpus is not None, "it has the place"
            return self._corpus.item(row), f"{self._corpus.origin}, record {row}"
        record = self._dataset.record(row)
        item = (
            record.query
            if kind == QUERY
            else record.positive
            if kind == POSITIVE
            else record.negatives[place]
        )
        return item, f"{self._dataset.reader.origin}, record {row}"
