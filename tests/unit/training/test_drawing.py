"""What the model draws is found out with items of the run's own data."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.dataset import Sample
from vembed_ds.data.processors import EncodedItem
from vembed_ds.engine.activation import _Recomputation
from vembed_ds.errors import ConfigError
from vembed_ds.training.drawing import examine_draws
from vembed_ds.training.self_test import _largest


class Model(nn.Module):
    """Has dropout in its text tower."""

    streams = ("text", "image", "joint")

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.hidden: Iterator[float] = itertools.repeat(1.0)
        self.embedded: list[tuple[str, int]] = []

    def forward(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        for stream, arguments in inputs.items():
            self.embedded.append((stream, arguments["input_ids"].shape[1]))
            if stream != "image":
                self.dropout(arguments["input_ids"].float())
        return {stream: torch.full((1, 2), next(self.hidden)) for stream in inputs}


def item(stream: str, length: int) -> EncodedItem:
    return EncodedItem(stream, {"input_ids": np.arange(length)})


def loop() -> Any:
    model = Model().eval()
    return SimpleNamespace(
        model=model,
        engine=SimpleNamespace(device=torch.device("cpu"), embed=model),
        processor=SimpleNamespace(filler=lambda stream: item(stream, 1)),
        pad=lambda stream, items: {
            k: torch.from_numpy(v)[None] for k, v in items[0].inputs.items()
        },
        budget=ChunkBudget(2),
        merged=frozenset(),
        memory=SimpleNamespace(may_cut=True),
    )


def test_streams_without_random_numbers_are_merged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = loop()
    examine_draws(run, {"text": item("text", 5), "image": item("image", 3)}, merge=True)
    assert run.merged == {"image"}, "nothing is known of a stream that nobody has met"
    assert run.model.embedded == 2 * [("text", 5)] + 2 * [("image", 3)]
    assert run.model.training, "it is tried out in training mode"
    assert "equal text items of a batch are embedded each time, because the model" in caplog.text
    assert "equal image items of a batch are embedded once" in caplog.text


def test_a_rank_without_a_stream_that_others_have_takes_a_filler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it would wait for, and be waited for, under ZeRO-3."""
    found = iter([[1, 1, 0], [1, 0]])  # streams that any rank has met; those that draw on any
    monkeypatch.setattr("vembed_ds.distributed.comm.all_max", lambda values: next(found))
    run = loop()
    examine_draws(run, {"image": item("image", 3)}, merge=True)
    assert run.model.embedded == 2 * [("text", 1)] + 2 * [("image", 3)]
    assert run.merged == {"image"}


def test_nothing_is_merged_unless_it_may_be() -> None:
    run = loop()
    examine_draws(run, {"image": item("image", 3)}, merge=False)
    assert run.merged == frozenset()


@pytest.mark.parametrize("merge", [True, False])
def test_chunks_of_a_model_with_hidden_random_numbers_are_refused(merge: bool) -> None:
    run, items = loop(), {"image": item("image", 3)}
    run.model.hidden = itertools.count(1.0)
    with pytest.raises(
        ConfigError, match="use_gradient_cache=true: the model embeds one image item in two ways"
    ):
        examine_draws(run, items, merge=merge)
    run.budget = ChunkBudget(None)  # nothing is computed twice
    examine_draws(run, items, merge=merge)
    assert run.merged == frozenset()
    assert not run.memory.may_cut, "nor is it when memory runs out"


def test_layers_of_a_model_with_hidden_random_numbers_are_not_computed_again() -> None:
    run = loop()
    run.model.hidden = itertools.count(1.0)
    run.budget = ChunkBudget(None)
    run.model.dropout.gradient_checkpointing = True
    with pytest.raises(
        ConfigError, match=r"gradient_checkpointing=true: the model embeds .* so a layer cannot be"
    ):
        examine_draws(run, {"image": item("image", 3)}, merge=True)


@pytest.mark.parametrize(("draw", "repeats"), [(torch.rand, False), (np.random.rand, True)])
def test_layers_repeat_the_draws_of_all_generators_where_there_are_any(
    draw: Callable[[int], Any], repeats: bool
) -> None:
    run = loop()
    layer = GradientCheckpointingLayer()
    layer._gradient_checkpointing_func = recomputation = _Recomputation(lambda run, *_: run())
    run.model.layer = layer
    run.model.dropout.forward = lambda values: draw(1)
    examine_draws(run, {"text": item("text", 3)}, merge=True)
    assert recomputation.repeats_all_draws == repeats
    assert run.memory.may_cut


def test_the_largest_item_of_every_stream_is_tried() -> None:
    samples = [
        Sample(0, {"query": [item("text", 3)], "positive": [item("image", 2)]}, keys={}),
        Sample(1, {"query": [item("text", 8)], "positive": [item("text", 4)]}, keys={}),
    ]
    sizes = {stream: len(i.inputs["input_ids"]) for stream, i in _largest(samples).items()}
    assert sizes == {"text": 8, "image": 2}
