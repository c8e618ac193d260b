"""Generators of a rank, put back or begun anew."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from vembed_ds.checkpointing.random_state import load_random_state, save_random_state
from vembed_ds.errors import CheckpointError

FILE = "random_state_rank_0.pt"


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def load(folder: Path, *, saved_ranks: int = 1, seed: int = 3, step: int = 7) -> None:
    load_random_state(folder, saved_ranks=saved_ranks, seed=seed, step=step)


def test_the_same_number_of_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.random.randn()  # leaves a second value for the next call
    save_random_state(tmp_path)
    expected = [*draw(), random.gauss(0, 1), float(np.random.randn())]
    draw()
    load(tmp_path)
    assert [*draw(), random.gauss(0, 1), float(np.random.randn())] == expected
    assert not caplog.records


def test_another_number_of_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No file is needed; seed, step and rank decide."""
    drawn = {}
    with caplog.at_level(logging.INFO, logger="vembed_ds"):
        for seed, step in [(3, 7), (3, 7), (4, 7), (3, 8)]:
            load(tmp_path, saved_ranks=2, seed=seed, step=step)
            values = draw()
            assert drawn.setdefault((seed, step), values) == values
    assert len({tuple(values) for values in drawn.values()}) == 3
    assert "2 ranks wrote it, 1 go on. Drawn anew from seed 3, step 7 and rank" in caplog.text


def test_another_kind_of_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_random_state(tmp_path)
    state = torch.load(tmp_path / FILE)
    if state.pop("accelerator", None) is None:
        state["accelerator"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, tmp_path / FILE)
    with caplog.at_level(logging.INFO, logger="vembed_ds"):
        load(tmp_path)
    assert "it was written with another kind of device. Drawn anew" in caplog.text


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{FILE}: missing; the checkpoint is incomplete"):
        load(tmp_path)


@pytest.mark.parametrize("state", [{}, [1], {"torch": torch.ones(3), "python": 1, "numpy": 2}])
def test_a_file_that_holds_something_else(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=rf"{FILE}: damaged: no random state"):
        load(tmp_path)
