"""Cutting a batch into chunks, and finding the rows again."""

from __future__ import annotations

import numpy as np
import pytest

from vembed_ds.data.batches import count_streams, plan_step, role_index
from vembed_ds.data.processors import EncodedItem


def items(stream: str, names: str) -> list[EncodedItem]:
    return [EncodedItem(stream, {"name": np.array([ord(c)])}) for c in names]


def names(found: list[EncodedItem]) -> str:
    return "".join(chr(item.inputs["name"][0]) for item in found)


def test_roles_that_share_a_tower_are_one_stream() -> None:
    plan = plan_step(
        {"query": items("text", "abc"), "positive": items("text", "xyz")}, chunk_size=4
    )
    assert names(plan.streams["text"]) == "abcxyz"
    assert plan.chunks == [{"text": slice(0, 4)}, {"text": slice(4, 6)}]
    assert {role: rows.tolist() for role, rows in role_index(plan).items()} == {
        "query": [0, 1, 2],
        "positive": [3, 4, 5],
    }


def test_rows_of_two_streams_are_counted_one_behind_the_other() -> None:
    mixed = items("image", "x") + items("text", "y") + items("image", "z")
    plan = plan_step({"query": items("text", "abc"), "positive": mixed}, chunk_size=None)
    assert len(plan.chunks) == 1
    order = names([i for stream in plan.streams.values() for i in stream])
    for role, expected in {"query": "abc", "positive": "xyz"}.items():
        assert "".join(order[row] for row in role_index(plan)[role]) == expected


def test_a_rank_with_less_runs_as_many_chunks_as_the_others() -> None:
    filler = items("image", "?")[0]
    plan = plan_step(
        {"query": items("text", "abcde")},
        chunk_size=2,
        counts={"text": 6, "image": 3},
        fillers={"image": filler, "text": items("text", "!")[0]},
    )
    assert plan.chunks == [
        {"text": slice(0, 2), "image": slice(0, 2)},
        {"text": slice(2, 4), "image": slice(2, 3)},
        {"text": slice(4, 6)},
    ]
    for chunk in plan.chunks:
        for stream, places in chunk.items():
            assert plan.streams[stream][places], "every chunk of a stream holds something"
    assert role_index(plan)["query"].tolist() == [0, 1, 2, 3, 4]


def test_a_stream_that_no_rank_uses_is_in_no_chunk() -> None:
    plan = plan_step({"query": items("text", "ab")}, chunk_size=1, counts={"text": 2, "image": 0})
    assert plan.chunks == [{"text": slice(0, 1)}, {"text": slice(1, 2)}]


@pytest.mark.parametrize(("count", "size", "chunks"), [(6, 3, 2), (7, 3, 3), (1, 3, 1)])
def test_number_of_chunks(count: int, size: int, chunks: int) -> None:
    plan = plan_step({"query": items("text", "abcdefg"[:count])}, chunk_size=size)
    assert len(plan.chunks) == chunks
    assert sum(len(plan.streams["text"][c["text"]]) for c in plan.chunks) == count


def test_streams_are_counted() -> None:
    roles = {"query": items("text", "ab"), "positive": items("image", "c")}
    assert count_streams(roles, ["text", "image", "audio"]) == [2, 1, 0]
