"""What must not be a negative, against sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pytest

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.records import Item, RecordReader
from vembed_ds.mining.contents import POSITIVE, Contents, read_contents

Row = tuple[str, str, int | None]


class NoProcessor(ItemProcessor):
    """Nothing is encoded here."""

    def encode(self, item: Item, *, origin: str, augment_seed: int | None) -> EncodedItem:
        raise NotImplementedError


def contents_of(rows: Sequence[Row]) -> Contents:
    columns: dict[str, list[Any]] = dict(
        zip(("query", "positive", "label"), map(list, zip(*rows, strict=True)), strict=True)
    )
    if columns["label"][0] is None:
        del columns["label"]
    table = datasets.Dataset.from_dict(columns)
    reader = RecordReader(
        table.column_names, retrieval_mode="t2t", column_mapping={}, image_root="", origin="pairs"
    )
    dataset = PairDataset(table, reader=reader, processor=NoProcessor(), seed=0)
    return read_contents(dataset, None)


def excluded_texts(contents: Contents, rows: Sequence[Row], queries: list[int]) -> list[set[str]]:
    pairs = contents.excluded.pairs(queries)
    assert (pairs.queries.diff() >= 0).all(), "as a search asks for"
    found: list[set[str]] = [set() for _ in queries]
    for line, document in zip(pairs.queries.tolist(), pairs.rows.tolist(), strict=True):
        kind, row, _ = contents.documents[document]
        assert kind == POSITIVE
        found[line].add(rows[row][1])
    return found


def plainly(rows: Sequence[Row], query: str) -> set[str]:
    labels = {label for asked, _, label in rows if asked == query and label is not None}
    return {d for asked, d, label in rows if query in (asked, d) or label in labels}


@pytest.mark.parametrize("labelled", [False, True])
def test_equals_sets(labelled: bool) -> None:
    generator = np.random.default_rng(0)
    rows: list[Row] = []
    for _ in range(60):
        query, document, label = generator.integers(0, (25, 30, 9)).tolist()
        if query != document:
            rows.append((f"text {query}", f"text {document}", label if labelled else None))
    contents = contents_of(rows)
    queries = list(dict.fromkeys(query for query, _, _ in rows))
    asked = [3, 0, len(queries) - 1, 3]
    expected = [plainly(rows, queries[number]) for number in asked]
    assert excluded_texts(contents, rows, asked) == expected
    assert any(queries[number] in texts for number, texts in zip(asked, expected, strict=True))


def test_a_large_class_stands_once() -> None:
    """Of 10,000 records of a class, a list for each query would have 100 million entries."""
    rows: list[Row] = [(f"query {n}", f"document {n}", 1) for n in range(300)]
    excluded = contents_of(rows).excluded
    assert sum(len(part.values) for part in excluded) == 4 * len(rows)
    assert len(excluded.pairs([7]).rows) == 301, "its own positive twice"
