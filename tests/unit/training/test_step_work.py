"""What a step embeds, counted item by item."""

from __future__ import annotations

import numpy as np
import pytest

from vembed_ds.data.batches import lay_out
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.processors import EncodedItem
from vembed_ds.training.step_work import StepWork, work_of


def text(length: int, fill: int = 1) -> EncodedItem:
    return EncodedItem("text", {"input_ids": np.full(length, fill)})


def image() -> EncodedItem:
    return EncodedItem("image", {"pixel_values": np.zeros((3, 32, 48), np.float32)})


def test_tokens_padding_and_patches() -> None:
    roles = {"query": [text(n, n) for n in (2, 5, 3, 7)], "positive": [image() for _ in range(4)]}
    plan = lay_out(roles, budget=ChunkBudget(2, tokens=None)).alone()
    assert len(plan.chunks) == 2  # texts of 7 and 5, then of 3 and 2 tokens
    found = work_of(plan, kept=1, trainable=lambda stream: True)
    assert found == StepWork(17, 2 * 7 + 2 * 3, 4 * 6, 2, 1)
    assert work_of(plan, kept=2, trainable=lambda stream: True).replayed == 0
    assert work_of(plan, kept=1, trainable=lambda stream: False).replayed == 0
    assert found.plus(found) == StepWork(34, 40, 48, 4, 2)


def test_equal_items_count_once_and_fillers_are_padding() -> None:
    roles = {"query": [text(4), text(4), text(2)]}
    layout = lay_out(roles, budget=ChunkBudget(1, tokens=None), merged={"text"})
    plan = layout.plan({"text": 4}, filler=lambda stream: text(3))
    found = work_of(plan, kept=1, trainable=lambda stream: True)
    assert found == StepWork(6, 6 + 2 * 3, 0, 4, 3)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_only_chunks_of_trained_streams_are_embedded_again(kept: int) -> None:
    roles = {"query": [text(n) for n in (6, 4, 2)], "positive": [image()]}
    plan = lay_out(roles, budget=ChunkBudget(1, tokens=None)).alone()
    assert [sorted(chunk) for chunk in plan.chunks] == [["image", "text"], ["text"], ["text"]]
    found = work_of(plan, kept=kept, trainable=lambda stream: stream == "image")
    assert found.replayed == (1 if kept < 3 else 0)
