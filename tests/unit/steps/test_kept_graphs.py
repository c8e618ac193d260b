"""How many graphs are kept: from what was measured, and after memory ran out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.unit.steps.plain_engine import LENGTH, PlainEngine, loss, make_plan, pad
from vembed_ds.steps import meters
from vembed_ds.steps.gradient_cache import compute_gradient
from vembed_ds.steps.kept_graphs import GraphBudget, KeptGraphs, padded_sizes
from vembed_ds.steps.meters import DeviceMeter, HostMeter, build_meter


class Scales:
    """A meter for which a graph holds 100 bytes, and so many are spare."""

    def __init__(self, spare: int) -> None:
        self.free, self.steps, self.weighed = spare, 0, 0

    def begin(self) -> None:
        self.steps += 1

    def weigh(self, forward: Callable[[], Any]) -> tuple[Any, int]:
        self.weighed += 1
        return forward(), 100

    def spare(self) -> int:
        return self.free


def step(graphs: KeptGraphs, *, chunk_size: int | None = 4, items: int = 11) -> int:
    """One step; how many graphs it kept."""
    compute_gradient(
        PlainEngine(),
        make_plan(chunk_size, items=items),
        loss_function=loss,
        pad=pad,
        trainable=lambda stream: True,
        graphs=graphs,
    )
    return graphs.number


def automatic(spare: int, **settings: Any) -> tuple[KeptGraphs, Scales]:
    scales = Scales(spare)
    return KeptGraphs(budget=GraphBudget(scales, **settings)), scales


@pytest.mark.parametrize(
    ("spare", "kept"), [(0, 1), (-50, 1), (49, 1), (99, 1), (100, 2), (349, 4), (10**9, 6)]
)
def test_a_measured_step_keeps_one_and_those_behind_it_what_fits(spare: int, kept: int) -> None:
    graphs, scales = automatic(spare)
    assert [step(graphs) for _ in range(3)] == [1, kept, kept]
    assert scales.steps == 1
    assert scales.weighed == 6  # every chunk, the kept one included


def test_what_keeping_several_takes_beside_the_graphs_is_set_aside() -> None:
    graphs, _ = automatic(500, reserve=lambda: 300)
    assert [step(graphs) for _ in range(2)] == [1, 3]


def test_a_smaller_chunk_is_a_smaller_graph() -> None:
    graphs, _ = automatic(100)
    assert [step(graphs), step(graphs)] == [1, 2]
    assert step(graphs, chunk_size=2) == 1 + 2  # 50 bytes each


def test_a_step_with_a_larger_chunk_is_measured_again() -> None:
    graphs, scales = automatic(200)
    assert [step(graphs, chunk_size=3), step(graphs, chunk_size=3)] == [1, 3]
    assert [step(graphs), step(graphs), step(graphs, chunk_size=3)] == [1, 3, 3]
    assert scales.steps == 2


def test_the_least_that_was_ever_spare_counts() -> None:
    graphs, scales = automatic(200, reserve=lambda: 100 if scales.steps == 1 else 0)
    assert [step(graphs, chunk_size=3), step(graphs, chunk_size=3)] == [1, 2]
    assert [step(graphs), step(graphs)] == [1, 2]  # the host's meter is read once, before moments


def test_one_chunk_is_the_standard_step_and_needs_no_measuring() -> None:
    graphs, scales = automatic(10**9)
    assert step(graphs, chunk_size=None) == 1
    assert scales.steps == 0


def test_a_step_that_breaks_off_teaches_nothing() -> None:
    graphs, scales = automatic(10**9)
    with pytest.raises(ZeroDivisionError), graphs.step(make_plan(4)):
        graphs.forward(lambda: 1 / 0)
    assert [step(graphs), step(graphs)] == [1, 6]
    assert scales.steps == 2


def test_a_number_stands() -> None:
    assert step(KeptGraphs(3)) == 3
    assert step(KeptGraphs(99)) == 6


def test_the_ranks_keep_the_fewest() -> None:
    asked: list[int] = []

    def agree(number: int) -> int:
        asked.append(number)
        return min(2, number)

    graphs = KeptGraphs(budget=GraphBudget(Scales(10**9)), agree=agree)
    assert [step(graphs), step(graphs), step(graphs, chunk_size=None)] == [1, 2, 1]
    assert asked == [1, 6]


@pytest.mark.parametrize("wanted", [4, None])
def test_after_a_shortage_one_and_then_half(wanted: int | None) -> None:
    graphs = KeptGraphs(4) if wanted else automatic(10**9)[0]
    before = [step(graphs), step(graphs)][-1]
    graphs.keep_fewer()
    assert [step(graphs), step(graphs)] == [1, before // 2]
    graphs.keep_fewer()
    assert [step(graphs), step(graphs)] == [1, before // 4]
    graphs.keep_fewer()  # of another rank: this one kept one
    graphs.keep_one()
    assert [step(graphs), step(graphs)] == [1, 1]


def test_a_rank_that_kept_one_may_keep_more_after_another_s_shortage() -> None:
    graphs, _ = automatic(10**9)
    step(graphs)
    graphs.keep_fewer()
    assert [step(graphs), step(graphs)] == [1, 6]


def test_the_first_decision_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vembed_ds")
    graphs, _ = automatic(300 << 20)
    for _ in range(3):
        step(graphs)
    step(KeptGraphs(2))
    assert [record.getMessage() for record in caplog.records] == [
        "gradient cache: the graphs of 6 of 6 chunks are kept (the largest takes 0 MB, and there "
        "are 300 MB for further ones)",
        "gradient cache: the graphs of 2 of 6 chunks are kept",
    ]


def test_sizes_are_those_of_padded_chunks() -> None:
    def sizes(items: int, tokens: int, patches: int = 0) -> dict[tuple[str, str], int]:
        found = {"tokens": items * tokens, "pairs of tokens": items * tokens**2}
        found |= {"patches": patches, "pairs of patches": patches**2} if patches else {}
        return {("text", of): size for of, size in found.items()}

    plan = make_plan(4, items=3)
    assert padded_sizes(plan) == [sizes(4, LENGTH), sizes(2, LENGTH)]
    first, *others = plan.streams["text"]
    first.inputs["input_ids"] = first.inputs["input_ids"][:1]
    assert padded_sizes(plan) == [sizes(4, LENGTH), sizes(2, LENGTH)]
    for item in others[:3]:
        item.inputs["input_ids"] = item.inputs["input_ids"][:2]
    assert padded_sizes(plan) == [sizes(4, 2), sizes(2, LENGTH)]
    first.inputs["pixel_values"] = np.zeros((3, 32, 32))
    assert padded_sizes(plan)[0] == sizes(4, 2, patches=4)


def test_longer_items_are_measured_though_the_tokens_are_as_many() -> None:
    """Attention may hold the square of a text's length."""
    graphs, _ = automatic(10**9)
    assert [step(graphs), step(graphs)] == [1, 6]
    longer = make_plan(1, items=3)  # as many tokens as four items had
    for item in longer.streams["text"]:
        item.inputs["input_ids"] = np.tile(item.inputs["input_ids"], 4)
    with graphs.step(longer) as number:
        graphs.forward(dict)
        assert number == 1


MLP = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 8))
ROWS = 64


def recomputed(values: torch.Tensor) -> torch.Tensor:
    found = checkpoint(MLP, values, use_reentrant=False)
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize(
    ("forward", "with_graph", "numbers"),
    [
        (MLP, True, 128 + 8),  # what ReLU gives, which the next layer needs too, and the result
        (MLP, False, 8),
        (recomputed, True, 8),
        (lambda values: MLP(values * 2), True, 32 + 128 + 8),
    ],
)
def test_the_host_s_meter_counts_what_the_graph_holds(
    forward: Callable[[torch.Tensor], torch.Tensor], with_graph: bool, numbers: int
) -> None:
    values = torch.randn(ROWS, 32)
    with torch.set_grad_enabled(with_graph):
        result, weight = HostMeter(1).weigh(lambda: forward(values))
    assert result.requires_grad == with_graph
    assert weight == ROWS * numbers * 4


def test_the_host_is_shared_by_its_ranks_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "free_host_bytes", lambda: 1000)
    meter = HostMeter(2)
    assert meter.spare() == 250
    monkeypatch.setattr(meters, "free_host_bytes", lambda: 10)
    assert meter.spare() == 250
    monkeypatch.setattr(meters, "free_host_bytes", lambda: None)
    assert HostMeter(2).spare() == 0


def test_an_accelerator_s_meter_reads_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = {"allocated": 500, "peak": 900}, []
    module = SimpleNamespace(
        reset_peak_memory_stats=lambda device: asked.append(device),
        memory_allocated=lambda device: now["allocated"],
        max_memory_allocated=lambda device: now["peak"],
        memory_reserved=lambda device: 1200,
        mem_get_info=lambda device: (5000, 10000),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    device = torch.device("cuda", 1)
    meter = build_meter(device, local_ranks=8)
    assert isinstance(meter, DeviceMeter)
    meter.begin()
    assert asked == [device]
    result, weight = meter.weigh(lambda: now.update(allocated=740) or "result")
    assert (result, weight) == ("result", 240)
    # 5000 free, 1200 held of which 900 were in use at the peak, and a tenth of 10000 is left alone.
    assert meter.spare() == 5000 + 1200 - 900 - 1000
