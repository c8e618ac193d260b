"""The step on a plain engine: what is computed how often, and what is left when it breaks off."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.unit.steps.plain_engine import ITEMS, PlainEngine, loss, make_plan, pad
from vembed_ds.distributed import phases
from vembed_ds.distributed.seeding import capture_rng
from vembed_ds.steps import gradient_cache
from vembed_ds.steps.gradient_cache import StepResult, compute_gradient
from vembed_ds.steps.kept_graphs import KeptGraphs
from vembed_ds.steps.shortage import MemoryShortage, emptied

CHUNK, CHUNKS = 4, 6  # of 22 items; the last one has two


def run(
    engine: PlainEngine, *, kept: int = 1, chunk_size: int | None = CHUNK, **more: Any
) -> StepResult:
    torch.manual_seed(1)
    return compute_gradient(
        engine,
        make_plan(chunk_size),
        loss_function=loss,
        pad=pad,
        trainable=lambda stream: True,
        graphs=KeptGraphs(kept),
        **more,
    )


@pytest.mark.parametrize(("kept", "computed_again"), [(1, 5), (2, 4), (5, 1), (6, 0), (99, 0)])
def test_a_chunk_that_keeps_its_graph_is_computed_once(kept: int, computed_again: int) -> None:
    engine = PlainEngine()
    run(engine, kept=kept)
    assert len(engine.forwards) == CHUNKS + computed_again
    assert [with_graph for _, with_graph in engine.forwards[:CHUNKS]] == [
        index >= CHUNKS - kept for index in range(CHUNKS)
    ]
    assert engine.backwards == CHUNKS


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_kept_changes_no_bit(dropout: float) -> None:
    found = []
    for kept in (1, 2, 3, CHUNKS):
        engine = PlainEngine(dropout=dropout)
        result = run(engine, kept=kept)
        found.append([result.loss, *engine.gradients(), capture_rng(engine.device).host])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_what_python_and_numpy_draw_is_drawn_again(draw: Callable[[], float]) -> None:
    """Layers that are left out, or masks, of models whose authors did not ask torch."""
    found = []
    for kept in (1, CHUNKS):
        engine = PlainEngine()
        engine.module.linear1.register_forward_hook(lambda module, inputs, output: output * draw())
        random.seed(2)
        np.random.seed(2)
        result = run(engine, kept=kept)
        found.append([result.loss, *engine.gradients(), torch.tensor(draw())])
    assert all(map(torch.equal, *found))


def test_with_all_graphs_it_is_the_plain_step() -> None:
    plain, cached = PlainEngine(), PlainEngine()
    rows = plain.embed({"text": pad("text", make_plan(None).streams["text"])})["text"]
    expected = torch.nn.functional.cross_entropy(rows[:ITEMS] @ rows[ITEMS:].T, torch.arange(ITEMS))
    expected.backward()  # type: ignore[no-untyped-call]
    found = run(cached, kept=CHUNKS)
    torch.testing.assert_close(found.loss, expected.detach())
    for got, want in zip(cached.gradients(), plain.gradients(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dropout", "restored"), [(0.0, 0), (0.3, 4 + 1)])
def test_random_states_are_put_back_only_where_something_was_drawn(
    dropout: float, restored: int
) -> None:
    engine = PlainEngine(dropout=dropout)
    restore = mock.Mock(wraps=gradient_cache.restore_rng)
    with mock.patch.object(gradient_cache, "restore_rng", restore):
        run(engine, kept=2)  # four chunks are computed again, then the state is as it was
    assert restore.call_count == restored


def test_chunks_are_differentiated_from_the_last_to_the_first() -> None:
    engine = PlainEngine()
    seen: list[str] = []
    plain = engine.backward

    def backward(surrogate: Tensor) -> None:
        seen.append(str(phases.current()).rpartition(": ")[2])
        plain(surrogate)

    engine.backward = backward  # type: ignore[method-assign]
    run(engine, kept=2)
    kept = [f"differentiating chunk {number} of 6" for number in (6, 5)]
    assert seen == kept + [f"replaying chunk {number} of 6" for number in (4, 3, 2, 1)]


class OutOfMemory:
    """Fails the n-th call of a method of the engine, and holds no tensor of it."""

    def __init__(self, engine: PlainEngine, name: str, call: int) -> None:
        self.calls, self.call = 0, call
        self.plain = getattr(engine, name)
        setattr(engine, name, self)

    def __call__(self, value: Any) -> Any:
        self.calls += 1
        if self.calls == self.call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.plain(value)


def one_rank(cause: BaseException | None) -> None:
    if cause is not None:
        raise MemoryShortage(cause, kept=True, largest=CHUNK)


@pytest.mark.parametrize(
    ("method", "call"), [("embed", 2), ("embed", 6), ("embed", 8), ("backward", 1), ("backward", 4)]
)
def test_what_broke_off_holds_nothing(method: str, call: int) -> None:
    """With the collector off: DeepSpeed, when it leaves the step, and the next attempt need memory."""
    engine, saved = PlainEngine(dropout=0.3), []
    engine.when_broken = lambda: at_the_end.extend(storage.expired() for storage in saved)
    at_the_end: list[bool] = []
    engine.module.linear2.register_forward_pre_hook(
        lambda module, inputs: saved.append(StorageWeakRef(inputs[0].untyped_storage()))
    )
    OutOfMemory(engine, method, call)
    gc.collect()
    gc.disable()
    try:
        try:
            run(engine, kept=3, agree=one_rank)
        except MemoryShortage as error:
            shortage = emptied(error)
        assert saved
        assert all(storage.expired() for storage in saved)
        assert all(at_the_end)
    finally:
        gc.enable()
    assert isinstance(shortage.cause, torch.OutOfMemoryError)
    assert not engine.reduced
    assert engine.gradients() == []


def test_the_ranks_agree_before_the_loss_and_before_the_reduction() -> None:
    asked: list[tuple[int, int, bool]] = []
    engine = PlainEngine()
    run(
        engine,
        agree=lambda cause: asked.append((len(engine.forwards), engine.backwards, engine.reduced)),
    )
    assert asked == [(6, 0, False), (11, 6, False)]


@pytest.mark.parametrize("agree", [None, one_rank])
def test_other_errors_pass_at_once(agree: Any) -> None:
    engine = PlainEngine()

    def fail(surrogate: Tensor) -> None:
        raise ValueError("no shortage")

    engine.backward = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no shortage"):
        run(engine, agree=agree)
    assert not engine.reduced
