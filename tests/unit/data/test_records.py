from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from vembed_ds.data.records import Item, Record, RecordReader
from vembed_ds.errors import ConfigError, DataError


def reader(columns: list[str], *, mode: str = "t2t", **options: Any) -> RecordReader:
    settings = {"column_mapping": {}, "image_root": "", "origin": "train.jsonl"} | options
    return RecordReader(columns, retrieval_mode=mode, **settings)


@pytest.mark.parametrize(
    ("mode", "columns", "mapping", "chosen"),
    [
        ("t2t", ["query", "positive"], {}, ["query", "positive"]),
        ("t2t", ["caption", "positive"], {}, ["caption", "positive"]),
        ("t2t", ["caption", "query", "positive"], {}, ["query", "positive"]),
        ("t2i", ["query", "positive"], {}, ["query", "positive"]),
        ("t2i", ["caption", "image"], {}, ["caption", "image"]),
        ("t2i", ["query", "positive", "image"], {}, ["query", "image"]),
        ("t2i", ["query", "image", "positive_image"], {}, ["query", "positive_image"]),
        ("i2t", ["query_image", "query", "positive"], {}, ["query_image", "positive"]),
        ("i2t", ["query", "positive"], {}, ["query", "positive"]),
        ("i2i", ["query", "image"], {}, ["query", "image"]),
        ("t2i", ["a", "b", "query"], {"query": "a", "positive": "b"}, ["a", "b"]),
        (
            "t2i",
            ["a", "b", "c"],
            {"query": "a", "positive": "c", "positive_image": "b"},
            ["a", "b"],
        ),
        ("i2i", ["a", "b", "c"], {"query_image": "a", "query": "c", "positive": "b"}, ["a", "b"]),
        ("t2t", ["text"], {"query": "text", "positive": "text"}, ["text"]),
    ],
)
def test_columns_follow_names_and_mode(
    mode: str, columns: list[str], mapping: dict[str, str], chosen: list[str]
) -> None:
    assert reader(columns, mode=mode, column_mapping=mapping).columns == chosen


def test_text_with_slash_or_image_suffix_stays_text() -> None:
    record = reader(["query", "positive"]).read({"query": "and/or", "positive": "cat.png"}, 3)
    assert record == Record(3, Item(text="and/or"), Item(text="cat.png"))


def test_image_paths_resolve_against_image_root() -> None:
    pairs = reader(["query", "image"], mode="t2i", image_root="/data/pictures")
    assert (
        pairs.read({"query": "a", "image": "x/1.png"}, 0).positive.image == "/data/pictures/x/1.png"
    )
    assert pairs.read({"query": "a", "image": "/abs/1.png"}, 0).positive.image == "/abs/1.png"


def test_image_values_of_every_kind_are_kept() -> None:
    pairs = reader(["query", "image"], mode="t2i", image_root="/root")
    picture = Image.new("RGB", (2, 2))
    values = [
        (b"png", b"png"),
        (picture, picture),
        ({"bytes": b"png", "path": "1.png"}, b"png"),
        ({"bytes": None, "path": "1.png"}, "/root/1.png"),
    ]
    for value, kept in values:
        assert pairs.read({"query": "a", "image": value}, 0).positive.image == kept


def test_missing_column_names_candidates_columns_and_remedy() -> None:
    message = (
        r"train.jsonl \(retrieval_mode=t2i\): no column holds the image of the positive: looked "
        r"for 'positive_image', 'image', 'positive', the columns are 'query', 'text'; name the "
        r"column with column_mapping: \{positive_image: COLUMN\}"
    )
    with pytest.raises(DataError, match=message):
        reader(["query", "text"], mode="t2i")


def test_text_positive_never_falls_back_to_the_image_column() -> None:
    with pytest.raises(DataError, match="no column holds the text of the positive"):
        reader(["query", "image"], mode="t2t")


def test_no_columns_at_all_are_called_none() -> None:
    with pytest.raises(DataError, match="the columns are none"):
        reader([])


def test_mapping_to_a_missing_column_is_an_error() -> None:
    message = (
        r"column_mapping query='qq' names a missing column; the columns are 'query', 'positive'"
    )
    with pytest.raises(DataError, match=message):
        reader(["query", "positive"], column_mapping={"query": "qq"})


@pytest.mark.parametrize("mode", ["m2i", "t2m", "text", "", "t2"])
def test_unknown_mode_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="not a known mode; use t2t, t2i, i2t or i2i"):
        reader(["query", "positive"], mode=mode)


@pytest.mark.parametrize("blank", [None, "", " \n\t"])
def test_blank_text_is_an_error(blank: str | None) -> None:
    with pytest.raises(
        DataError, match=r"train.jsonl, record 7, column 'query': .* is a blank text"
    ):
        reader(["query", "positive"]).read({"query": blank, "positive": "b"}, 7)


@pytest.mark.parametrize(
    ("value", "kind"), [(3, "int"), (0.5, "float"), (["a"], "list"), (True, "bool")]
)
def test_text_of_wrong_type_is_an_error(value: object, kind: str) -> None:
    with pytest.raises(DataError, match=rf"record 7, column 'positive': .* is {kind}, not text"):
        reader(["query", "positive"]).read({"query": "a", "positive": value}, 7)


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(DataError) as caught:
        reader(["query", "positive"]).read({"query": list(range(1000)), "positive": "b"}, 0)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("blank", [None, "", " ", b"", {"bytes": None, "path": None}])
def test_empty_image_is_an_error(blank: object) -> None:
    with pytest.raises(DataError, match=r"record 7, column 'image': .* is no image"):
        reader(["query", "image"], mode="t2i").read({"query": "a", "image": blank}, 7)


@pytest.mark.parametrize("value", [3, [1, 2], {"url": "x"}])
def test_image_of_wrong_type_is_an_error(value: object) -> None:
    kind = type(value).__name__
    with pytest.raises(DataError, match=rf"column 'image': .* is {kind}, not an image"):
        reader(["query", "image"], mode="t2i").read({"query": "a", "image": value}, 7)


def test_explicit_negatives_are_refused_rather_than_dropped() -> None:
    with pytest.raises(DataError, match="column 'negatives': explicit negatives are not trained"):
        RecordReader(
            ["query", "positive", "negatives"],
            retrieval_mode="t2t",
            column_mapping={},
            image_root="",
            origin="pairs.jsonl",
        )
