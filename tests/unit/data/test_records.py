from __future__ import annotations

from datetime import date, datetime
from typing import Any

import pytest
import torch
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
    anywhere = reader(["query", "image"], mode="t2i")
    assert anywhere.read({"query": "a", "image": "/abs/1.png"}, 0).positive.image == "/abs/1.png"


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


@pytest.mark.parametrize("mode", ["v2i", "t2v", "text", "", "t2"])
def test_unknown_mode_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="not a known mode; write QUERY2POSITIVE with t"):
        reader(["query", "positive"], mode=mode)


@pytest.mark.parametrize("blank", [None, "", " \n\t"])
def test_blank_text_is_an_error(blank: str | None) -> None:
    with pytest.raises(
        DataError, match=r"train.jsonl, record 7, column 'query': .* is a blank text"
    ):
        reader(["query", "positive"]).read({"query": blank, "positive": "b"}, 7)


@pytest.mark.parametrize(
    ("value", "kind"), [(3, "int"), (0.5, "float"), ([["a"]], "list"), (True, "bool")]
)
def test_text_of_wrong_type_is_an_error(value: object, kind: str) -> None:
    with pytest.raises(DataError, match=rf"record 7, column 'positive': .* is {kind}, not text"):
        reader(["query", "positive"]).read({"query": "a", "positive": value}, 7)


@pytest.mark.parametrize("value", [datetime(2020, 1, 2), date(2020, 1, 2)])
def test_texts_that_were_read_as_dates_say_so(value: date) -> None:
    with pytest.raises(
        DataError, match=r"'query': 2020-01-02.* was read as a date.*save .* as CSV"
    ):
        reader(["query", "positive"]).read({"query": value, "positive": "b"}, 0)


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(DataError) as caught:
        reader(["query", "positive"]).read({"query": [list(range(1000))], "positive": "b"}, 0)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("blank", [None, "", " ", b"", {"bytes": None, "path": None}])
def test_empty_image_is_an_error(blank: object) -> None:
    with pytest.raises(DataError, match=r"record 7, column 'image': .* is no image"):
        reader(["query", "image"], mode="t2i").read({"query": "a", "image": blank}, 7)


@pytest.mark.parametrize("value", [3, 0.5, {"url": "x"}])
def test_image_of_wrong_type_is_an_error(value: object) -> None:
    kind = type(value).__name__
    with pytest.raises(DataError, match=rf"column 'image': .* is {kind}, not an image"):
        reader(["query", "image"], mode="t2i").read({"query": "a", "image": value}, 7)


def test_one_value_in_a_list_is_that_value() -> None:
    """As FlagEmbedding writes it."""
    pairs = reader(["query", "image"], mode="t2i")
    record = pairs.read({"query": ["a"], "image": ["1.png"]}, 0)
    assert record == Record(0, Item(text="a"), Item(image="1.png"))
    message = r"record 7, column 'image': \['1.png', '2.png'\] is 2 values, and a record has one "
    with pytest.raises(DataError, match=message + "positive; write one record for each"):
        pairs.read({"query": "a", "image": ["1.png", "2.png"]}, 7)
    with pytest.raises(DataError, match="column 'query': None is a blank text"):
        pairs.read({"query": [], "image": "1.png"}, 7)


def test_both_parts_of_an_item_are_read() -> None:
    pairs = reader(["query", "query_image", "image"], mode="m2i", image_root="/r")
    record = pairs.read({"query": "a", "query_image": "q.png", "image": "p.png"}, 0)
    assert record.query == Item(text="a", image="/r/q.png")
    assert record.positive == Item(image="/r/p.png")
    assert pairs.parts == {"text", "image"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "query_image": None}, "column 'query_image': None is no image"),
        ({"query": " ", "query_image": "q.png"}, "column 'query': ' ' is a blank text"),
    ],
)
def test_a_role_that_needs_what_the_record_lacks(row: dict[str, Any], message: str) -> None:
    pairs = reader(["query", "query_image", "positive"], mode="m2t")
    with pytest.raises(DataError, match=f"train.jsonl, record 5, {message}"):
        pairs.read(row | {"positive": "b"}, 5)


def test_free_mixing_takes_what_the_record_holds() -> None:
    pairs = reader(["query", "query_image", "positive", "image"], mode="x2x")
    rows = [("a", None, None, "p.png"), (None, "q.png", "b", ""), ("a", "q.png", "b", "p.png")]
    names = ("query", "query_image", "positive", "image")
    records = [pairs.read(dict(zip(names, row, strict=True)), 0) for row in rows]
    assert [record.query for record in records] == [
        Item(text="a"),
        Item(image="q.png"),
        Item(text="a", image="q.png"),
    ]
    assert [record.positive for record in records] == [
        Item(image="p.png"),
        Item(text="b"),
        Item(text="b", image="p.png"),
    ]
    with pytest.raises(DataError, match="record 9: the query has neither text nor image"):
        pairs.read(dict(zip(names, (None, " ", "b", None), strict=True)), 9)


def test_free_mixing_needs_a_column_of_either_kind() -> None:
    assert reader(["query", "positive_image"], mode="x2x").parts == {"text", "image"}
    with pytest.raises(DataError, match="no column holds the text or image of the query"):
        reader(["text", "positive"], mode="x2x")


@pytest.mark.parametrize(
    ("cell", "texts"),
    [(None, []), ([], []), ("", []), (" ", []), ("b", ["b"]), (["b", "c"], ["b", "c"])],
)
def test_negatives_are_a_list_or_one(cell: Any, texts: list[str]) -> None:
    pairs = reader(["query", "positive", "negatives"])
    record = pairs.read({"query": "a", "positive": "p", "negatives": cell}, 0)
    assert record.negatives == tuple(Item(text=text) for text in texts)
    assert pairs.has_negatives


def test_negatives_are_of_the_positives_kind() -> None:
    row = {"query": "a", "positive": "p.png", "negatives": ["n.png"]}
    assert reader(list(row), mode="t2i").read(row, 0).negatives == (Item(image="n.png"),)
    assert reader(list(row), mode="t2t").read(row, 0).negatives == (Item(text="n.png"),)
    both = row | {"image": "p.png", "negative_images": ["m.png"]}
    assert reader(list(both), mode="t2m").read(both, 0).negatives == (
        Item(text="n.png", image="m.png"),
    )
    mixed = both | {"negatives": ["n", None], "negative_images": [None, "m.png"]}
    assert reader(list(mixed), mode="t2x").read(mixed, 0).negatives == (
        Item(text="n"),
        Item(image="m.png"),
    )


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([" "], "column 'negatives', value 0: ' ' is a blank text"),
        (["b", 3], "column 'negatives', value 1: 3 is int, not text"),
        (3, "column 'negatives': 3 is int, not a list of negatives"),
        *(
            (cell, "is a list written as one text; .* save the data as JSONL or Parquet")
            for cell in ('["x", "y"]', "['x', 'y']", " ['x' 'y'] ", "[]", '["x",\n"y"]')
        ),
    ],
)
def test_bad_negatives_are_named(cell: Any, message: str) -> None:
    pairs = reader(["query", "positive", "negatives"])
    with pytest.raises(DataError, match=f"(?s)record 4, .*{message}"):
        pairs.read({"query": "a", "positive": "p", "negatives": cell}, 4)


def test_texts_and_images_of_negatives_go_together() -> None:
    columns = ["query", "positive", "image", "negatives", "negative_images"]
    row = dict(zip(columns, ["a", "p", "p.png", ["n"], ["m.png", "o.png"]], strict=True))
    with pytest.raises(DataError, match="'negatives' has 1, 'negative_images' has 2 values"):
        reader(columns, mode="t2m").read(row, 0)


def test_labels_are_numbers_or_texts_and_an_id_is_none() -> None:
    row = {"query": "a", "positive": "b", "id": 7}
    assert reader(list(row)).read(row, 0).label is None
    for name, value in (("label", 3), ("class_id", 3)):
        labelled = {**row, name: value}
        assert reader(list(labelled)).read(labelled, 0).label == 3
    texts = [{**row, "label": text} for text in ("cat", "dog", "cat")]
    first, second, third = (reader(list(texts[0])).read(text, 0).label for text in texts)
    assert first == third != second
    large = [{**row, "label": number} for number in (2**64 - 1, 2**63, 2**64 - 1, -(2**63))]
    first, second, third, least = (reader(list(large[0])).read(r, 0).label for r in large)
    assert first == third != second
    assert least == -(2**63)
    assert torch.tensor([first, second]).dtype == torch.int64
    with pytest.raises(DataError, match="column 'label': None is no label"):
        reader([*row, "label"]).read({**row, "label": None}, 0)


@pytest.mark.parametrize("value", [None, "a", True, float("nan"), float("inf"), [1]])
def test_scores_are_numbers(value: Any) -> None:
    pairs = reader(["query", "positive", "score"])
    assert pairs.read({"query": "a", "positive": "b", "score": 0.25}, 0).score == 0.25
    with pytest.raises(DataError, match=r"column 'score': .* is no score"):
        pairs.read({"query": "a", "positive": "b", "score": value}, 0)


def test_instructions_go_with_the_role() -> None:
    pairs = reader(
        ["query", "positive", "negatives"],
        instructions={"query": "find: ", "positive": "passage: "},
    )
    record = pairs.read({"query": "a", "positive": "b", "negatives": "c"}, 0)
    assert record.query.instruction == "find: "
    assert record.positive.instruction == record.negatives[0].instruction == "passage: "


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        (["query", "positive", "video"], {}),
        (["query", "query_video", "positive"], {}),
        (["query", "positive", "clip"], {"positive_video": "clip"}),
    ],
)
def test_videos_are_refused_by_name(columns: list[str], mapping: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"column '\w*video': video is not supported, only texts"):
        reader(columns, column_mapping=mapping)
