"""A teacher's scores that stand in the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.archives import write_tar
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.data.shards import first_columns, numbered_rows, open_shards
from vembed_ds.errors import DataError

ROW = {
    "query": "a",
    "positive": "p",
    "negatives": ["n", "m"],
    "pos_scores": [0.9],
    "neg_scores": [0.25, -3],
}


def reader(columns: Any, *, wanted: bool = True, **mapping: str) -> RecordReader:
    return RecordReader(
        list(columns),
        retrieval_mode="t2t",
        column_mapping=mapping,
        image_root="",
        origin="train.jsonl",
        teacher_scores=wanted,
    )


@pytest.mark.parametrize(
    ("changes", "positive", "negatives"),
    [
        ({}, 0.9, (0.25, -3.0)),
        ({"pos_scores": 2}, 2.0, (0.25, -3.0)),
        ({"pos_scores": "1e-2", "negatives": "n", "neg_scores": "0.5"}, 0.01, (0.5,)),  # CSV
        ({"negatives": "", "neg_scores": " "}, 0.9, ()),
        ({"negatives": None, "neg_scores": None}, 0.9, ()),
    ],
)
def test_scores_go_with_their_documents(
    changes: dict[str, Any], positive: float, negatives: tuple[float, ...]
) -> None:
    record = reader(ROW).read(ROW | changes, 0)
    assert (record.teacher_score, record.negative_scores) == (positive, negatives)


def test_scores_are_read_only_when_they_are_wanted() -> None:
    plain = reader(ROW, wanted=False)
    assert plain.columns == ["query", "positive", "negatives"]
    assert plain.unread_scores == ["pos_scores", "neg_scores"]
    record = plain.read(ROW | {"pos_scores": "no number"}, 0)
    assert record.teacher_score is record.negative_scores is None
    assert reader(ROW).columns == list(ROW)
    assert reader(ROW).unread_scores == []
    assert reader(["query", "positive"], wanted=False).unread_scores == []
    assert reader(["query", "positive"], wanted=False, pos_scores="x").unread_scores == [
        "pos_scores"
    ]


def test_scores_without_negatives_and_in_other_columns() -> None:
    row = {"query": "a", "positive": "p", "ours": 0.5}
    record = reader(row, pos_scores="ours").read(row, 0)
    assert (record.teacher_score, record.negative_scores) == (0.5, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_scores": ["high"]}, "'pos_scores', value 0: 'high' is no score; give a finite numb"),
        ({"pos_scores": True}, "'pos_scores', value 0: True is no score"),
        ({"neg_scores": [0.5, float("nan")]}, "'neg_scores', value 1: nan is no score; .*: COLUMN"),
        ({"neg_scores": [float("-inf"), 1]}, "'neg_scores', value 0: -inf is no score"),
        ({"neg_scores": [0.5, 10**400]}, r"'neg_scores', value 1: 10+\.\.\. is no score"),
        ({"neg_scores": [None, 1]}, "'neg_scores', value 0: None is no score"),
        ({"pos_scores": [1, 2]}, "'pos_scores': .1, 2. is 2 scores, and the record has 1 positive"),
        (
            {"pos_scores": None},
            "'pos_scores': None is no score; give one for each, or remove the record",
        ),
        (
            {"neg_scores": [1]},
            "'neg_scores': .1. is 1 scores, and the record has 2 negatives; give",
        ),
        (
            {"neg_scores": None},
            "'neg_scores': None is no score; give one for each, or remove the record",
        ),
        (
            {"neg_scores": "[0.1, 0.2]", "negatives": "n"},
            r"'neg_scores', value 0: '\[0.1, 0.2\]' is no score",
        ),
    ],
)
def test_bad_scores_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"train.jsonl, record 4, column {message}"):
        reader(ROW).read(ROW | changes, 4)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (
            ["pos_scores"],
            "no column holds the scores of the positives: looked for 'pos_scores', the",
        ),
        (
            ["neg_scores"],
            "no column holds the scores of the negatives: looked for 'neg_scores', the columns are "
            "'query', .*; name it with column_mapping: {neg_scores: COLUMN}, or leave",
        ),
        (
            ["negatives"],
            "column 'neg_scores' has scores of negatives, and no column holds negatives",
        ),
    ],
)
def test_missing_columns_are_named(lacking: list[str], message: str) -> None:
    with pytest.raises(DataError, match=rf"train.jsonl \(retrieval_mode=t2t\): .*{message}"):
        reader([name for name in ROW if name not in lacking])


def test_lists_of_scores_come_from_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW))
    datasets.Dataset.from_list([ROW]).to_parquet(tmp_path / "a.parquet")
    write_tar(tmp_path, "a.tar", {"k.json": json.dumps(ROW).encode()})
    for name in ("a.jsonl", "a.parquet", "a.tar"):
        path = str(tmp_path / name)
        table = load_table([path], key="data_path")
        shards = open_shards([path], key="data_path")
        ((_, streamed),) = numbered_rows(shards[0], columns=first_columns(shards), needed=None)
        for row in (table[0], streamed):
            mapping = {role: f"json.{role}" for role in ROW} if name == "a.tar" else {}
            record = reader(row, **mapping).read(row, 0)
            assert (record.teacher_score, record.negative_scores) == (0.9, (0.25, -3.0))
