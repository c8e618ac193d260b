"""Whether a model draws random numbers is measured, whatever it draws from."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed.seeding import capture_rng
from vembed_ds.steps.random_draws import drawing_streams

STREAMS = ("text", "image")
CPU = torch.device("cpu")


class Model(nn.Module):
    """Embeds texts by way of something, images without."""

    def __init__(self, something: Callable[[Tensor], Any], *, longer_than: int = 0) -> None:
        super().__init__()
        self.something, self.longer_than = something, longer_than

    def forward(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        for stream, arguments in inputs.items():
            if stream == "text" and arguments["input_ids"].shape[1] > self.longer_than:
                self.something(arguments["input_ids"].float())
        return {stream: torch.zeros(1, 2) for stream in inputs}


def item(stream: str) -> EncodedItem:
    return EncodedItem(stream, {"input_ids": np.arange(9)})


def pad(stream: str, items: Sequence[EncodedItem]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([torch.from_numpy(i.inputs["input_ids"]) for i in items])}


def drawing(model: Model) -> set[str]:
    engine = SimpleNamespace(device=CPU, embed=model)
    return set(drawing_streams(engine, STREAMS, item=item, pad=pad))


@pytest.mark.parametrize(
    "something",
    [
        nn.Dropout(0.1),
        lambda values: torch.rand(2) < 0.5,
        lambda values: random.random(),
        lambda values: np.random.permutation(3),  # BigBird's random blocks
    ],
    ids=["dropout", "torch", "python", "numpy"],
)
def test_drawing_is_seen_and_leaves_no_trace(something: Any) -> None:
    before = capture_rng(CPU)
    assert drawing(Model(something)) == {"text"}
    assert before.equals(capture_rng(CPU))


@pytest.mark.parametrize("something", [nn.Dropout(0.0), nn.Dropout(0.1).eval(), nn.Identity()])
def test_what_draws_nothing_is_not_taken_for_dropout(something: Any) -> None:
    assert drawing(Model(something)) == set()


def test_the_item_that_is_given_is_the_one_that_is_tried() -> None:
    assert drawing(Model(nn.Dropout(0.1), longer_than=8)) == {"text"}
    assert drawing(Model(nn.Dropout(0.1), longer_than=9)) == set()
