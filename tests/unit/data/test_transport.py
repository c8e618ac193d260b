"""What a loader process sends arrives as it was, by whichever way."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vembed_ds.data import transport
from vembed_ds.data.processors import EncodedItem

FEW, MANY = transport.LARGE // 8, transport.LARGE


def sent(value: Any) -> Any:
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=transport.send, args=(theirs, value))
    thread.start()
    found = transport.receive(ours)
    thread.join()
    return found


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("vembed_ds part")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


ARRAYS: list[Callable[[], list[np.ndarray]]] = [
    lambda: [],
    lambda: [np.arange(5), np.zeros(0)],
    lambda: [np.arange(FEW - 1), np.arange(FEW), np.float32(range(MANY + 1)), np.arange(FEW)],
    lambda: [np.arange(MANY + number, dtype=np.uint8) for number in range(700)],
    lambda: [np.asfortranarray(np.random.rand(100, 200)), np.random.rand(90, 80)[::2, ::3]],
]


@pytest.mark.parametrize("arrays", ARRAYS)
def test_arrays_of_any_size_arrive(arrays: Callable[[], list[np.ndarray]]) -> None:
    values = arrays()
    before, opened = maps(), descriptors()
    found = sent({"arrays": values, "more": "words"})
    assert found["more"] == "words"
    for one, other in zip(values, found["arrays"], strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
        assert other.flags.aligned
        assert other.flags.writeable  # else torch warns
        torch.from_numpy(np.ascontiguousarray(other))
    assert maps() - before == any(value.nbytes >= transport.LARGE for value in values)
    found = other = None
    gc.collect()
    assert (maps(), descriptors()) == (before, opened)


def test_one_item_that_is_kept_keeps_the_memory() -> None:
    pixels = [np.full((3, 64, 64), index, np.float32) for index in range(4)]
    items = sent([EncodedItem("image", {"pixel_values": array}) for array in pixels])
    kept = items[2].inputs["pixel_values"]
    del items
    gc.collect()
    assert (kept == 2).all()


def test_without_such_memory_all_goes_through_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    before = maps()
    assert np.array_equal(sent(np.arange(10 * MANY)), np.arange(10 * MANY))
    assert maps() == before


def test_whoever_waits_for_a_process_that_ends_learns_it() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.send((b"", [transport.LARGE]))  # and no memory
    theirs.close()
    with pytest.raises(EOFError):
        transport.receive(ours)
