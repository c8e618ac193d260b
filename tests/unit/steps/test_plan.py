"""Laying a batch out as chunks, and finding the rows again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from vembed_ds.data.batches import Layout, StepPlan, collect_roles, lay_out, plan_step, role_index
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.processors import EncodedItem

STREAMS = ("text", "image")


def items(stream: str, names: str) -> list[EncodedItem]:
    """All of one size, each with a name."""
    return [EncodedItem(stream, {"name": np.array([ord(c)])}) for c in names]


def names(found: Sequence[EncodedItem]) -> str:
    return "".join(chr(item.inputs["name"][0]) for item in found)


def texts(*lengths: int) -> list[EncodedItem]:
    return [EncodedItem("text", {"input_ids": np.arange(length)}) for length in lengths]


def filler(stream: str) -> EncodedItem:
    return items(stream, "?")[0]


def agreed(layouts: Sequence[Layout]) -> list[StepPlan]:
    """The plans of ranks that have these batches."""
    counts = [layout.count_chunks(STREAMS) for layout in layouts]
    most = [max(of_stream) for of_stream in zip(*counts, strict=True)]
    return [layout.plan(dict(zip(STREAMS, most, strict=True)), filler=filler) for layout in layouts]


def test_roles_that_share_a_tower_are_one_stream() -> None:
    roles = {"query": items("text", "abc"), "positive": items("text", "xyz")}
    plan = lay_out(roles, budget=ChunkBudget(4)).alone()
    assert names(plan.streams["text"]) == "abcxyz"
    assert plan.chunks == [{"text": slice(0, 4)}, {"text": slice(4, 6)}]
    assert plan.units == [4, 2]
    assert {role: rows.tolist() for role, rows in role_index(plan).items()} == {
        "query": [0, 1, 2],
        "positive": [3, 4, 5],
    }


def test_rows_of_two_streams_are_counted_one_behind_the_other() -> None:
    mixed = items("image", "x") + items("text", "y") + items("image", "z")
    roles = {"query": items("text", "abc"), "positive": mixed}
    plan = lay_out(roles, budget=ChunkBudget(None)).alone()
    assert len(plan.chunks) == 1
    order = names([i for stream in plan.streams.values() for i in stream])
    for role, expected in {"query": "abc", "positive": "xyz"}.items():
        assert "".join(order[row] for row in role_index(plan)[role]) == expected


def test_the_longest_come_first_and_every_role_finds_its_own() -> None:
    roles = {"query": texts(2, 9, 3), "positive": texts(4, 9, 1)}
    plan = lay_out(roles, budget=ChunkBudget(2)).alone()
    lengths = [len(item.inputs["input_ids"]) for item in plan.streams["text"]]
    assert lengths == [9, 9, 4, 3, 2, 1]
    assert [chunk["text"] for chunk in plan.chunks] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert plan.units == [18, 8, 4]
    for role, of_role in roles.items():
        found = [plan.streams[stream][place] for stream, place in plan.roles[role]]
        assert [len(i.inputs["input_ids"]) for i in found] == [
            len(i.inputs["input_ids"]) for i in of_role
        ]


def test_switched_off_the_cut_is_that_of_the_batch() -> None:
    roles = {"query": texts(2, 9, 3), "positive": texts(4, 9)}
    plan = lay_out(roles, budget=ChunkBudget(2, tokens=None, sort=False)).alone()
    assert plan.streams["text"] == [*roles["query"], *roles["positive"]]
    assert [chunk["text"] for chunk in plan.chunks] == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_a_rank_with_less_runs_as_many_chunks_as_the_others() -> None:
    rich = {"query": items("text", "abcdef"), "positive": items("image", "uvw")}
    poor = {"query": items("text", "abcde")}
    budget = ChunkBudget(2)
    whole, plan = agreed([lay_out(rich, budget=budget), lay_out(poor, budget=budget)])
    expected = [("text", "image"), ("text", "image"), ("text",)]
    assert [tuple(chunk) for chunk in whole.chunks] == expected
    assert [tuple(chunk) for chunk in plan.chunks] == expected
    assert names(plan.streams["image"]) == "??"
    for chunk in plan.chunks:
        for stream, places in chunk.items():
            assert plan.streams[stream][places], "every chunk of a stream holds something"
    assert role_index(plan)["query"].tolist() == [0, 1, 2, 3, 4]


def test_work_is_shared_out_before_fillers_are_taken() -> None:
    long = lay_out({"query": texts(*[50] * 12)}, budget=ChunkBudget(2))
    short = lay_out({"query": texts(4, 3, 3, 2)}, budget=ChunkBudget(2))
    assert [layout.count_chunks(["text"]) for layout in (long, short)] == [[6], [2]]
    plan = agreed([long, short])[1]
    assert [c["text"] for c in plan.chunks] == [slice(n, n + 1) for n in range(6)]
    assert names(plan.streams["text"][4:]) == "??"
    assert plan.units == [4, 3, 3, 2, 1, 1]


def test_ranks_with_any_items_make_the_same_chunks() -> None:
    generator = random.Random(0)
    for _ in range(200):
        ranks = []
        for _ in range(3):
            own = texts(*(generator.randint(1, 60) for _ in range(generator.randint(0, 15))))
            pictures = items("image", "abcdefg"[: generator.randint(0, 7)])
            ranks.append({"query": own + pictures})
        budget = ChunkBudget(
            generator.choice([None, 1, 2, 5]), tokens=generator.choice(["auto", None, 70])
        )
        plans = agreed([lay_out(roles, budget=budget) for roles in ranks])
        for roles, plan in zip(ranks, plans, strict=True):
            assert [list(chunk) for chunk in plan.chunks] == [list(c) for c in plans[0].chunks]
            for stream in STREAMS:
                own = [item for item in roles["query"] if item.stream == stream]
                parts = [chunk[stream] for chunk in plan.chunks if stream in chunk]
                covered = [place for p in parts for place in range(p.start, p.stop)]
                assert covered == list(range(len(plan.streams[stream])))
                assert len(plan.streams[stream]) == max(len(own), len(parts))
                assert all(p.stop > p.start for p in parts)
            found = [plan.streams[stream][place] for stream, place in plan.roles["query"]]
            assert [id(item) for item in found] == [id(item) for item in roles["query"]]


def test_equal_items_of_all_roles_are_one_row() -> None:
    roles = {"query": texts(3, 5, 3), "positive": texts(5, 2, 3)}
    plan = lay_out(roles, budget=ChunkBudget(None), merged=["text"]).alone()
    assert [len(item.inputs["input_ids"]) for item in plan.streams["text"]] == [5, 3, 2]
    places = {role: [place for _, place in found] for role, found in plan.roles.items()}
    assert places == {"query": [1, 0, 1], "positive": [0, 2, 1]}
    apart = lay_out(roles, budget=ChunkBudget(None), merged=["image"]).alone()
    assert len(apart.streams["text"]) == 6


def test_the_gradient_of_a_row_is_the_sum_of_its_places() -> None:
    roles = {"query": texts(3, 3), "positive": texts(3, 5)}
    plan = lay_out(roles, budget=ChunkBudget(1), merged=["text"]).alone()
    chunks = [{"text": torch.full((1, 1), float(n), requires_grad=True)} for n in range(2)]
    rows = collect_roles(plan, chunks)
    assert rows["query"].values.tolist() == [[1.0], [1.0]]
    assert rows["positive"].values.tolist() == [[1.0], [0.0]]
    (rows["query"].values * torch.tensor([[2.0], [3.0]])).sum().backward(retain_graph=True)
    (rows["positive"].values * torch.tensor([[5.0], [7.0]])).sum().backward()
    assert [float(chunk["text"].grad) for chunk in chunks] == [7.0, 10.0]


def test_a_stream_that_no_rank_uses_is_in_no_chunk() -> None:
    plan = plan_step(
        {"query": items("text", "ab")}, budget=ChunkBudget(1), streams=STREAMS, filler=filler
    )
    assert plan.chunks == [{"text": slice(0, 1)}, {"text": slice(1, 2)}]


@pytest.mark.parametrize(("count", "size", "chunks"), [(6, 3, 2), (7, 3, 3), (1, 3, 1)])
def test_number_of_chunks(count: int, size: int, chunks: int) -> None:
    layout = lay_out({"query": items("text", "abcdefg"[:count])}, budget=ChunkBudget(size))
    plan = layout.alone()
    assert len(plan.chunks) == chunks
    assert sum(len(plan.streams["text"][c["text"]]) for c in plan.chunks) == count


def test_chunks_are_counted_by_stream() -> None:
    roles = {"query": items("text", "ab"), "positive": items("image", "c")}
    layout = lay_out(roles, budget=ChunkBudget(1))
    assert layout.count_chunks(["text", "image", "audio"]) == [2, 1, 0]
