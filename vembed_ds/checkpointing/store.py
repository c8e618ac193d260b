"""Engine checkpoints: ``<output_dir>/checkpoint-step-<N>`` and the file ``latest``."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from vembed_ds.checkpointing.consolidate import check_files
from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError, one_line

LATEST = "latest"
STATE = "trainer_state.json"
LENGTH = " (num_steps follows from epochs or max_steps, batch_size and the data)"
# Universal checkpoints of ZeRO-1/2 cannot be made later without it.
_UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def save_checkpoint(
    engine: DeepSpeedEngine,
    *,
    output_dir: Path,
    step: int,
    state: Mapping[str, Any],
    describe: Callable[[Path], None],
    write: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write weights, optimizer, schedule, random states and ``state``; then move ``latest``.

    Collective: every rank calls it. ``latest`` moves only after every rank has written.

    Args:
        engine: The engine to save.
        output_dir: Folder of the run.
        step: Optimizer steps done.
        state: Plain values, kept as JSON.
        describe: Called on rank 0 with the folder ``model/``, to write what rebuilds the model.
        write: Called on every rank with the checkpoint's folder, to write more of the rank's state;
            not collective.

    Returns:
        The checkpoint's folder.
    """
    folder = output_dir / f"checkpoint-step-{step}"
    engine.save_checkpoint(
        str(output_dir), tag=folder.name, client_state=dict(_UNIVERSAL), save_latest=False
    )
    facts = {
        "step": step,
        "world_size": comm.world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        **state,
    }

    def write_own_files() -> None:
        torch.save(_random_state(), _random_file(folder))
        write(folder)
        if comm.is_main():
            describe(folder / "model")
            (folder / STATE).write_text(json.dumps(facts, indent=2))

    comm.run_together(write_own_files, doing=f"writing {folder}")
    comm.run_together(lambda: _point_at(folder), doing=f"writing {output_dir / LATEST}")
    return folder


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint to resume from.

    Args:
        resume: A checkpoint's folder, a run's folder, or ``"auto"`` (the run's own latest).
        output_dir: Folder of this run.

    Returns:
        The folder; ``None`` only for ``"auto"`` when the run has no checkpoint yet.

    Raises:
        CheckpointError: Nothing to resume from.
    """
    place = output_dir if resume == "auto" else Path(resume)
    if (place / STATE).is_file():
        return place
    pointer = place / LATEST
    if pointer.is_file():
        folder = place / pointer.read_text().strip()
        if (folder / STATE).is_file():
            return folder
        raise CheckpointError(f"{pointer} names {folder.name}, which is not a complete checkpoint")
    if resume == "auto":
        return None
    raise CheckpointError(
        f"--resume {resume}: no checkpoint there (no {STATE} and no file {LATEST}); "
        "name a folder checkpoint-step-N or a run's output folder"
    )


def check_resumable(folder: Path, *, zero_stage: int, state: Mapping[str, Any]) -> int:
    """Refuse a checkpoint of another run before a model is loaded. Collective.

    Args:
        folder: From :func:`find_checkpoint`.
        zero_stage: Of this run.
        state: What this run would pass to :func:`save_checkpoint`.

    Returns:
        Optimizer steps that the checkpoint has done.

    Raises:
        CheckpointError: On every rank: another number of ranks, ZeRO stage, or anything else
            that decides which samples come next; or a file is missing.
    """

    def check() -> int:
        saved = _read_state(folder / STATE)
        now = {"world_size": comm.world_size(), "zero_stage": zero_stage, **state}
        changed = [
            f"{key} was {saved.get(key)!r}, is {value!r}"
            for key, value in now.items()
            if saved.get(key) != value
        ]
        if changed:
            length = saved.get("num_steps") != now.get("num_steps")
            raise CheckpointError(
                f"{folder}: belongs to another run: {'; '.join(changed)}; resume with what it was "
                f"written with{LENGTH if length else ''}, or start afresh from its converted model"
            )
        if not _random_file(folder).is_file():
            raise CheckpointError(f"{_random_file(folder)}: missing; the checkpoint is incomplete")
        check_files(folder, zero_stage=zero_stage, world_size=comm.world_size())
        return int(saved["step"])

    return comm.run_together(check, doing=f"reading {folder}")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        int(state["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); resume from an earlier checkpoint-step-N folder"
        ) from error
    return state


def load_checkpoint(engine: DeepSpeedEngine, folder: Path) -> None:
    """Put everything back that :func:`save_checkpoint` wrote. Collective.

    Raises:
        CheckpointError: DeepSpeed found nothing to load, or a file is damaged. The other ranks
            then end with this one, not by an error of their own.
    """
    try:
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded, a file is damaged ({one_line(error)}); resume from an "
            "earlier checkpoint-step-N folder"
        ) from error
    if loaded is None:
        raise CheckpointError(
            f"{folder}: DeepSpeed found nothing to load; the folder is incomplete"
        )
    if engine.zero_optimization_partition_weights():
        # Loading leaves small parameters gathered, as no fresh engine has them. DeepSpeed learns at
        # a module's first forward pass what it reads of its children (CLIP's number of positions),
        # and only of what is not gathered then; later such a read met a prefetch and got no data.
        engine.optimizer.checkpoint_event_prologue()
    _restore_random_state(torch.load(_random_file(folder), weights_only=True))


def _point_at(folder: Path) -> None:
    if comm.is_main():
        pointer = folder.parent / f"{LATEST}.tmp"
        pointer.write_text(folder.name)
        pointer.replace(folder.parent / LATEST)


def _random_file(folder: Path) -> Path:
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
