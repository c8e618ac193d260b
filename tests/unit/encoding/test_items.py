from __future__ import annotations

from typing import Any

import datasets
import pytest

from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.encoding.items import (
    ItemColumns,
    ItemTable,
    check_parts,
    choose_columns,
    stated_instruction,
)
from vembed_ds.errors import ConfigError, DataError


def choose(columns: list[str], *, role: str = "auto", **given: str) -> ItemColumns:
    return choose_columns(columns, role=role, given=given, origin="a.jsonl")


@pytest.mark.parametrize(
    ("columns", "role", "parts", "found"),
    [
        (["query", "id"], "auto", {"text": "query"}, "query"),
        (["caption"], "auto", {"text": "caption"}, "query"),
        (["passage", "title"], "auto", {"text": "passage"}, "document"),
        (["text"], "auto", {"text": "text"}, None),
        (["text"], "query", {"text": "text"}, "query"),
        (["text", "image"], "auto", {"text": "text", "image": "image"}, "document"),
        (["query", "positive"], "document", {"text": "positive"}, "document"),
        (["query", "positive", "image"], "query", {"text": "query"}, "query"),
    ],
)
def test_columns_by_their_names(
    columns: list[str], role: str, parts: dict[str, str], found: str | None
) -> None:
    chosen = choose(columns, role=role)
    assert (chosen.parts, chosen.role) == (parts, found)


def test_given_columns_win_and_exclude_the_others() -> None:
    chosen = choose(["query", "image", "jpg", "key"], image="jpg", id="key")
    assert chosen == ItemColumns({"image": "jpg"}, "key", None)
    assert chosen.names == ["jpg", "key"]
    assert [choose(["text", name]).id for name in ("id", "_id", "__key__", "number")] == [
        "id",
        "_id",
        "__key__",
        None,
    ]


def test_columns_that_leave_a_question_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"has queries \(column 'query'\) and documents \(column 'p"
    ):
        choose(["query", "positive"])
    with pytest.raises(
        DataError, match=r"looked for 'text', the columns are 'a', 'b'; name it with"
    ):
        choose(["a", "b"])
    with pytest.raises(DataError, match=r"--columns text=c: no such column; the columns are 'a'"):
        choose(["a"], text="c")


def test_items_that_the_model_does_not_embed_are_refused() -> None:
    both = ItemColumns({"text": "t", "image": "i"}, None, None)
    check_parts(both, parts=("text", "image"), streams=("text", "image", "joint"), origin="a")
    with pytest.raises(
        ConfigError, match=r"column 'i' holds the image of an item, but the model em"
    ):
        check_parts(both, parts=("text",), streams=("text",), origin="a")
    with pytest.raises(ConfigError, match=r"choose one with --columns text=t or image=i"):
        check_parts(both, parts=("text", "image"), streams=("text", "image"), origin="a")


def test_the_instruction_is_that_of_the_role() -> None:
    settings: dict[str, Any] = {"query_instruction": "find: ", "document_instruction": ""}
    columns = [ItemColumns({"text": "t"}, None, role) for role in ("query", "document", None)]
    assert [stated_instruction(settings, one) for one in columns[:2]] == ["find: ", ""]
    assert stated_instruction({}, columns[2]) == ""
    with pytest.raises(ConfigError, match="--role auto: the columns do not say whether"):
        stated_instruction(settings, columns[2])
    with pytest.raises(ConfigError, match="say which it shall read with --instruction TEXT"):
        stated_instruction({"query_instruction": None}, columns[0])


def table(rows: dict[str, list[Any]], parts: dict[Any, str]) -> ItemTable:
    return ItemTable(
        datasets.Dataset.from_dict(rows),
        columns=ItemColumns(parts, None, None),
        processor=ItemProcessor(),
        instruction="see: ",
        image_root="/pictures",
        origin="a.jsonl",
    )


def test_rows_are_read_as_training_reads_them() -> None:
    rows = {"t": ["a", None, " "], "i": ["x.png", "y.png", ""]}
    both = table(rows, {"text": "t", "image": "i"})
    assert both.item(0) == Item("a", "/pictures/x.png", "see: ")
    assert both.item(1) == Item(None, "/pictures/y.png", "see: ")
    with pytest.raises(DataError, match=r"a.jsonl, record 2: has neither text nor image \(columns"):
        both.item(2)
    with pytest.raises(DataError, match=r"a.jsonl, record 1, column 't': None is a blank text"):
        table(rows, {"text": "t"}).item(1)
    with pytest.raises(DataError, match=r"'/etc/x.png' lies outside image_root='/pictures'"):
        table({"i": ["/etc/x.png"]}, {"image": "i"}).item(0)
    found = both[2]
    assert isinstance(found, DataError)
