"""A step that has no memory is made again, smaller: on one rank, by a plain engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.memory import measure
from tests.unit.steps.plain_engine import PlainEngine, loss, make_roles, pad
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.collators import Batch
from vembed_ds.errors import OutOfMemoryError
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.kept_graphs import KeptGraphs
from vembed_ds.training.loop import Intervals, TrainingLoop
from vembed_ds.training.step_memory import StepMemory
from vembed_ds.training.teacher_sources import Teachers

BATCH = Batch(indices=[], roles=make_roles())  # 22 items of one stream


class Loop(TrainingLoop):
    """A loop around the plain engine, whose judges and losses are counted."""

    def __init__(self, engine: PlainEngine, *, budget: ChunkBudget, memory: StepMemory) -> None:
        processor = SimpleNamespace(filler=lambda stream: BATCH.roles["query"][0], pad=pad)
        super().__init__(
            engine=cast(Any, engine),
            model=cast(Any, SimpleNamespace(streams=["text"], trainable=lambda stream: True)),
            loader=[],
            processor=cast(Any, processor),
            loss_functions=[],
            budget=budget,
            intervals=Intervals(num_steps=1, steps_per_epoch=None, logging_steps=1),
            tracker=None,
            save=lambda step: Path(),
            guard=cast(Any, None),
            replicas=cast(Any, None),
            teachers=Teachers({}, widths={}),
            memory=memory,
        )
        self.judged = 0
        self.teachers.judge = self._say_nothing  # type: ignore[method-assign]

    def _say_nothing(self, *arguments: Any) -> tuple[Any, ...]:
        self.judged += 1
        return ()

    def batch_loss(self, batch: Batch, said: Any = ()) -> Any:
        return loss


class Short(PlainEngine):
    """Has memory for chunks of so many items, and for so many graphs at a time."""

    def __init__(self, *, most_items: int, most_graphs: int = 99, dropout: float = 0.3) -> None:
        super().__init__(dropout=dropout)
        self.most_items, self.most_graphs, self.graphs = most_items, most_graphs, 0

    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        outputs = super().embed(inputs)
        self.graphs += torch.is_grad_enabled()
        if len(inputs["text"]["values"]) > self.most_items or self.graphs > self.most_graphs:
            self.graphs = 0
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return outputs

    def backward(self, surrogate: Tensor) -> None:
        self.graphs -= 1
        super().backward(surrogate)


def step(engine: PlainEngine, *, chunk_size: int | None, kept: int = 1) -> Loop:
    memory = StepMemory(KeptGraphs(kept), can_agree=True)
    loop = Loop(engine, budget=ChunkBudget(chunk_size, tokens=None), memory=memory)
    torch.manual_seed(1)
    loop.compute_gradient(BATCH)
    assert loop.judged == 1
    return loop


@pytest.mark.parametrize(
    ("chunk_size", "kept", "most_items", "most_graphs", "size", "graphs"),
    [
        (4, 3, 4, 2, 4, 1),  # fewer graphs are enough
        (16, 1, 5, 1, 4, 1),  # 16, 8, 4
        (16, 2, 5, 1, 4, 1),  # the graphs first
        (None, 1, 5, 1, 5, 1),  # 22, 11, 5
        (100, 1, 11, 1, 11, 1),  # there are 22
    ],
)
def test_the_gradient_is_that_of_the_smaller_step(
    chunk_size: int | None, kept: int, most_items: int, most_graphs: int, size: int, graphs: int
) -> None:
    short, enough = Short(most_items=most_items, most_graphs=most_graphs), PlainEngine(dropout=0.3)
    loop = step(short, chunk_size=chunk_size, kept=kept)
    state = torch.get_rng_state()
    assert (loop.budget.items, loop.memory.graphs.number) == (size, graphs)
    step(enough, chunk_size=size, kept=kept)
    assert all(map(torch.equal, short.gradients(), enough.gradients()))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_too_much_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    engine = Short(most_items=4, most_graphs=2)
    loop = step(engine, chunk_size=8, kept=4)
    loop.compute_gradient(BATCH)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    message = "the step is made again, with the same gradient, "
    assert caplog.records[0].getMessage() == (
        "no memory: rank 0, start: embedding chunk 1 of 3 (CUDA out of memory. Tried to allocate "
        f"2.00 GiB.); {message}keeping one graph, and later fewer than up to now"
    )
    assert (
        caplog.records[1]
        .getMessage()
        .endswith(f"{message}with gradient_cache_chunk_size 8 -> 4 from now on")
    )


def test_one_item_is_the_least() -> None:
    with pytest.raises(OutOfMemoryError, match=r"^start: embedding chunk 1 of 22: no memory: CUDA"):
        step(Short(most_items=0), chunk_size=4)


def test_what_computes_otherwise_the_second_time_is_not_cut() -> None:
    memory = StepMemory(KeptGraphs(2), can_agree=True)
    memory.may_cut = False
    loop = Loop(Short(most_items=5), budget=ChunkBudget(None), memory=memory)
    with pytest.raises(OutOfMemoryError, match=r"^start: embedding chunk 1 of 1: no memory: CUDA"):
        loop.compute_gradient(BATCH)
    assert loop.budget.items is None


def test_at_zero_3_nobody_is_asked() -> None:
    said: list[tuple[ChunkBudget, int]] = []

    def explain(cause: BaseException, budget: ChunkBudget, kept_graphs: int) -> OutOfMemoryError:
        said.append((budget, kept_graphs))
        return OutOfMemoryError("explained")

    engine = Short(most_items=0)
    memory = StepMemory(KeptGraphs(2), can_agree=False, explain=explain)
    with pytest.raises(OutOfMemoryError, match="explained"):
        Loop(engine, budget=ChunkBudget(11), memory=memory).compute_gradient(BATCH)
    assert said == [(ChunkBudget(11), 2)]
    assert not engine.reduced


def test_memory_in_the_loss_is_not_the_chunks_(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the step made again; the error knows by which chunks and graphs it was made."""

    def fail(rows: Mapping[str, Embeddings], learned: Mapping[str, Tensor]) -> Tensor:
        raise MemoryError

    said: list[tuple[ChunkBudget, int]] = []

    def explain(cause: BaseException, budget: ChunkBudget, kept_graphs: int) -> OutOfMemoryError:
        said.append((budget, kept_graphs))
        return OutOfMemoryError(type(cause).__name__)

    monkeypatch.setattr(Loop, "batch_loss", lambda self, batch, said: fail)
    memory = StepMemory(KeptGraphs(2), can_agree=True, explain=explain)
    loop = Loop(Short(most_items=5), budget=ChunkBudget(16, tokens=None), memory=memory)
    with pytest.raises(OutOfMemoryError, match="MemoryError"):
        loop.compute_gradient(BATCH)
    assert said == [(ChunkBudget(4, tokens=None), 1)]


REAL = """
import resource
import torch
from torch import nn
from tests.unit.training import test_step_memory as case
from tests.unit.steps.plain_engine import PlainEngine

class Wide(PlainEngine):
    # The graph of an item holds 16 MB.
    def embed(self, inputs):
        values = self.module(inputs["text"]["values"].mean(1)).repeat_interleave(1 << 14, 1)
        for _ in range(4):
            values = values.tanh()
        return {"text": values.view(-1, 64, 1 << 14).mean(2)}

def gradient(chunk_size, kept, limit=None):
    engine = Wide()
    torch.manual_seed(2)
    engine.module = nn.Linear(16, 64)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))
    loop = case.step(engine, chunk_size=chunk_size, kept=kept)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return loop, engine.gradients()
"""


def test_memory_that_really_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a chunk of eight holds 128 MB; the process may take 120 more than it has."""
    # What is freed is given back at once, so that the outcome depends on nothing else.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    code = (
        "gradient(1, 1)  # what libraries take once\n"
        "loop, found = gradient(8, 3, limit=120 << 20)\n"
        "_, expected = gradient(loop.budget.items, 1)\n"
        "outcome = loop.budget.items, loop.memory.graphs.number, all(map(torch.equal, found, expected))"
    )
    _, outcome = measure(REAL, code)
    assert outcome == "(4, 1, True)"
