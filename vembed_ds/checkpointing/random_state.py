"""The random generators of every rank, in a checkpoint."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vembed_ds.checkpointing.torch_file import read_plain
from vembed_ds.distributed import comm
from vembed_ds.distributed.seeding import seed_everything
from vembed_ds.errors import CheckpointError, counted, one_line

logger = logging.getLogger(__name__)


def save_random_state(folder: Path) -> None:
    """Write this rank's generators. Every rank calls it.

    Raises:
        OSError: They cannot be written.
    """
    torch.save(_random_state(), random_file(folder))


def load_random_state(folder: Path, *, saved_ranks: int, seed: int, step: int) -> None:
    """Put back what :func:`save_random_state` wrote on this rank, or begin anew.

    No rank of another number of ranks has a state to go on from; and one that was saved on a CPU
    says nothing about an accelerator. Then the generators begin anew, the same in every such resume.

    Args:
        folder: A checkpoint.
        saved_ranks: Number of ranks that wrote it.
        seed: Of the run.
        step: Optimizer steps done.

    Raises:
        CheckpointError: This rank's file is missing or damaged.
    """
    if saved_ranks != comm.world_size():
        reason = f"{counted(saved_ranks, 'rank')} wrote it, {comm.world_size()} go on"
        _begin_anew(reason, seed, step)
        return
    path = random_file(folder)
    state = read_plain(path)
    try:
        if ("accelerator" in state) != torch.cuda.is_available():
            _begin_anew("it was written with another kind of device", seed, step)
        else:
            _restore_random_state(state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: no random state ({one_line(error)})") from error


def _begin_anew(reason: str, seed: int, step: int) -> None:
    words = np.random.SeedSequence([seed % 2**63, step, comm.rank()]).generate_state(1, np.uint64)
    seed_everything(int(words[0]) % 2**63)
    if comm.is_main():
        logger.info(
            "random states are not those of the checkpoint: %s. Drawn anew from seed %d, step %d "
            "and rank: dropout differs from that of an uninterrupted run, samples do not",
            reason,
            seed,
            step,
        )


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
