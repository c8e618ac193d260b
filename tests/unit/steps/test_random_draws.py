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
from vembed_ds.steps.random_draws import Draws, find_draws

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
        return {stream: self.row(stream) for stream in inputs}

    def row(self, stream: str) -> Tensor:
        """``[1, 2]``."""
        return torch.ones(1, 2)


class Hidden(Model):
    """Its texts depend on numbers that nobody sees."""

    def __init__(self, something: Callable[[Tensor], Any]) -> None:
        super().__init__(something)
        self.generator = torch.Generator().manual_seed(0)

    def row(self, stream: str) -> Tensor:
        drawn = torch.rand(1, 2, generator=self.generator)
        return drawn if stream == "text" else super().row(stream)


def item(stream: str) -> EncodedItem:
    return EncodedItem(stream, {"input_ids": np.arange(9)})


def pad(stream: str, items: Sequence[EncodedItem]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([torch.from_numpy(i.inputs["input_ids"]) for i in items])}


def drawing(model: Model) -> set[str]:
    found = find(model)
    assert Draws.HIDDEN not in found.values()
    return {stream for stream, draws in found.items() if draws}


def find(model: Model) -> dict[str, Draws]:
    engine = SimpleNamespace(device=CPU, embed=model)
    return find_draws(engine, STREAMS, item=item, pad=pad)


@pytest.mark.parametrize(
    ("something", "draws"),
    [
        (nn.Dropout(0.1), Draws.TORCH),
        (lambda values: torch.rand(2) < 0.5, Draws.TORCH),
        (lambda values: random.random(), Draws.OTHERS),
        (lambda values: np.random.permutation(3), Draws.OTHERS),  # BigBird's random blocks
        (lambda values: torch.rand(1) * random.random(), Draws.OTHERS),
    ],
    ids=["dropout", "torch", "python", "numpy", "both"],
)
def test_drawing_is_seen_and_leaves_no_trace(something: Any, draws: Draws) -> None:
    before = capture_rng(CPU)
    assert find(Model(something)) == {"text": draws, "image": Draws.NOTHING}
    assert before.equals(capture_rng(CPU))


@pytest.mark.parametrize("something", [nn.Dropout(0.0), nn.Dropout(0.1).eval(), nn.Identity()])
def test_what_draws_nothing_is_not_taken_for_dropout(something: Any) -> None:
    assert drawing(Model(something)) == set()


def test_the_item_that_is_given_is_the_one_that_is_tried() -> None:
    assert drawing(Model(nn.Dropout(0.1), longer_than=8)) == {"text"}
    assert drawing(Model(nn.Dropout(0.1), longer_than=9)) == set()


@pytest.mark.parametrize("something", [nn.Dropout(0.1), nn.Identity()])
def test_a_generator_that_nobody_sees_is_told_from_the_others(something: Any) -> None:
    found = find(Hidden(something))
    assert found == {"text": Draws.HIDDEN, "image": Draws.NOTHING}
