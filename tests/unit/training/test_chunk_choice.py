"""Which chunk size is chosen, from what chunks take and what is free."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from vembed_ds.training import chunk_choice
from vembed_ds.training.chunk_choice import Need, choose_size, free_bytes

NEEDS = [Need(size, chunk=10 * size, rest=100) for size in (96, 64, 32, 16, 8, 4, 2, 1)]


@pytest.mark.parametrize(
    ("room", "size"),
    [(10_000, 96), (1060, 96), (1059, 64), (740, 64), (739, 32), (260, 16), (115, 1), (0, 1)],
)
def test_the_size_grows_with_the_memory_that_is_free(room: int, size: int) -> None:
    assert choose_size(NEEDS, room=room) == size


@pytest.mark.parametrize(
    ("factor", "size"), [(0.5, 64), (1.0, 64), (1.1, 32), (2.0, 32), (2.1, 16), (100, 1)]
)
def test_a_chunk_that_takes_more_than_was_counted(
    factor: float, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    asked: list[int] = []

    def measure(number: int) -> int:
        asked.append(number)
        return int(factor * 10 * number)

    assert choose_size(NEEDS, room=740, measure=measure) == size
    assert asked == [64]
    assert f"gradient_cache_chunk_size: {size} of 96 items" in caplog.text
    assert ("times what was counted" in caplog.text) == (factor > 1)


@pytest.mark.parametrize(("enough", "size"), [(64, 64), (20, 16), (0, 1)])
def test_a_chunk_for_which_there_is_no_memory(enough: int, size: int) -> None:
    """What was counted may be wrong; smaller ones are tried until one fits, or none is left."""
    asked: list[int] = []

    def measure(number: int) -> int | None:
        asked.append(number)
        return 10 * number if number <= enough else None

    assert choose_size(NEEDS, room=740, measure=measure) == size
    assert asked == [n for n in (64, 32, 16, 8, 4, 2, 1) if n >= size]


@pytest.mark.parametrize(("room", "level"), [(110, "INFO"), (109, "WARNING")])
def test_what_does_not_fit_at_all_is_a_warning(
    room: int, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert choose_size(NEEDS, room=room) == 1
    assert [record.levelname for record in caplog.records] == [level]


class Full:
    """An engine on an accelerator that has no memory for more than two items."""

    device, chunks_are_local = torch.device("cpu"), True

    def __init__(self) -> None:
        self.seen: list[dict[str, int]] = []
        self.discarded = 0

    def parameters_held(self) -> AbstractContextManager[None]:
        return nullcontext()

    reduce_once = parameters_held

    def embed(self, inputs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        self.seen.append({stream: len(chunk["rows"]) for stream, chunk in inputs.items()})
        if max(self.seen[-1].values()) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {stream: chunk["rows"] for stream, chunk in inputs.items()}

    def backward(self, surrogate: Tensor) -> None:
        surrogate.backward()  # type: ignore[no-untyped-call]

    def discard_gradients(self) -> None:
        self.discarded += 1


def test_a_measured_chunk_is_one_of_a_step_and_may_find_no_memory() -> None:
    engine = Full()
    loop: Any = SimpleNamespace(
        engine=engine,
        model=SimpleNamespace(streams=("text", "image", "joint")),
        pad=lambda stream, items: {"rows": torch.ones(len(items), 3, requires_grad=True)},
    )
    items: Any = SimpleNamespace(
        longest={"text": "a text", "image": "an image"},
        count=lambda pairs: {"text": pairs, "image": 4 * pairs},
    )
    module = mock.MagicMock()
    module.memory_allocated.return_value, module.max_memory_allocated.return_value = 5, 25
    measure = chunk_choice._Measured(loop, items, 1)
    with mock.patch.object(torch, "get_device_module", return_value=module):
        assert measure(2) == 20
        assert measure(3) is None
    assert engine.seen == [{"text": 1, "image": 2}, {"text": 1, "image": 3}]
    assert engine.discarded == 2
    module.empty_cache.assert_called_once_with()


def test_where_passes_need_other_ranks_no_memory_is_an_error() -> None:
    engine: Any = Full()
    engine.chunks_are_local = False
    loop: Any = SimpleNamespace(
        engine=engine,
        model=SimpleNamespace(streams=("text",)),
        pad=lambda stream, items: {"rows": torch.ones(len(items), 3)},
    )
    items: Any = SimpleNamespace(longest={"text": "a text"}, count=lambda pairs: {"text": pairs})
    with (
        mock.patch.object(torch, "get_device_module", return_value=mock.MagicMock()),
        pytest.raises(torch.OutOfMemoryError),
    ):
        chunk_choice._Measured(loop, items, 8)(4)


def test_the_least_of_all_ranks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(values: list[int]) -> list[int]:
        return [max(value, -8) for value in values]  # it has room for 8

    monkeypatch.setattr(chunk_choice.comm, "all_max", other)
    assert choose_size(NEEDS, room=10_000) == 8


def test_free_bytes_of_the_host_are_shared() -> None:
    with mock.patch.object(chunk_choice, "free_host_bytes", return_value=1000):
        assert free_bytes(torch.device("cpu"), local_ranks=1) == 500
        assert free_bytes(torch.device("cpu"), local_ranks=4) == 125


def test_free_bytes_of_an_accelerator() -> None:
    """What the allocator holds and does not use counts; a tenth of all memory is left."""
    module = SimpleNamespace(
        mem_get_info=lambda device: (300, 1000),
        memory_reserved=lambda device: 600,
        memory_allocated=lambda device: 450,
    )
    with mock.patch.object(torch, "get_device_module", return_value=module):
        assert free_bytes(torch.device("cuda"), local_ranks=8) == 300 + 150 - 100
