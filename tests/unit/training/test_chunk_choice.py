"""Which chunk size is chosen, from what chunks take and what is free."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

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
