"""When parameters are gathered and gradients reduced, where the configuration leaves it open."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vembed_ds.engine import choices, memory
from vembed_ds.engine.choices import Gather, Reduce, choose_gather, choose_reduce
from vembed_ds.engine.memory import WholeBytes, rank_bytes, whole_bytes


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with 100 bytes, and a DeepSpeed that is as expected."""
    monkeypatch.setattr(choices, "rank_bytes", lambda: 100)
    monkeypatch.setattr(choices, "missing_internals", lambda engine: None)


def engine(stage: int) -> Any:
    return SimpleNamespace(zero_optimization_stage=lambda: stage)


@pytest.mark.usefixtures("has")
@pytest.mark.parametrize(
    ("need", "chosen"),
    [
        (WholeBytes(15, 10), "once"),
        (WholeBytes(15, 11), "cache_pass"),
        (WholeBytes(25, 100), "cache_pass"),
        (WholeBytes(26, 0), "per_module"),
    ],
)
def test_what_fits_is_held(need: WholeBytes, chosen: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_gather("auto", engine(3), need) == chosen
    assert caplog.text.count("\n") == 1
    assert f"zero3_gather: {chosen} (whole parameters take" in caplog.text


@pytest.mark.usefixtures("has")
def test_what_is_asked_for_is_done() -> None:
    need = WholeBytes(1000, 1000)
    assert [choose_gather(g, engine(3), need) for g in Gather] == list(Gather)
    assert [choose_reduce(r, need, zero_stage=3) for r in Reduce] == list(Reduce)
    assert choose_gather("once", engine(2), need) is Gather.PER_MODULE


@pytest.mark.usefixtures("has")
@pytest.mark.parametrize(
    ("gradients", "stage", "chosen"),
    [(25, 3, "once"), (26, 3, "per_chunk"), (26, 2, "per_chunk"), (26, 1, "once"), (26, 0, "once")],
)
def test_gradients_that_do_not_fit_are_reduced_per_chunk(
    gradients: int, stage: int, chosen: str
) -> None:
    assert choose_reduce("auto", WholeBytes(0, gradients), zero_stage=stage) == chosen


def test_whole_bytes() -> None:
    trained, frozen = (
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(5), requires_grad=False),
    )
    assert whole_bytes([trained, frozen], element_size=4) == (32, 12)
    # In 16 bit the sums are in float32, beside the gradient of the last chunk.
    assert whole_bytes([trained, frozen], element_size=2) == (16, 18)


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "4")
    accelerator = SimpleNamespace(device_name=lambda: "cpu", total_memory=lambda: 80)
    monkeypatch.setattr(memory, "get_accelerator", lambda: accelerator)
    assert rank_bytes() == 20
    accelerator.device_name = lambda: "cuda"
    assert rank_bytes() == 80
