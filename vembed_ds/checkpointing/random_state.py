"""The random generators of every rank, in a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vembed_ds.distributed import comm


def save_random_state(folder: Path) -> None:
    """Write this rank's generators. Every rank calls it.

    Raises:
        OSError: They cannot be written.
    """
    torch.save(_random_state(), random_file(folder))


def load_random_state(folder: Path) -> None:
    """Put back what :func:`save_random_state` wrote on this rank."""
    _restore_random_state(torch.load(random_file(folder), weights_only=True))


def random_file(folder: Path) -> Path:
    """This rank's file in a checkpoint."""
    return folder / f"random_state_rank_{comm.rank()}.pt"


def _random_state() -> dict[str, Any]:
    """Generators of this rank, in types that load without unpickling code."""
    version, keys, gauss = random.getstate()
    _, array, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(keys), gauss],
        "numpy": [torch.from_numpy(np.asarray(array).copy()), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["accelerator"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    array, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", array.numpy(), position, has_gauss, cached))
    if "accelerator" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["accelerator"])
