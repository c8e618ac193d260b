"""Engine checkpoints: ``<output_dir>/checkpoint-step-<N>`` and the file ``latest``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from vembed_ds.checkpointing.random_state import save_random_state
from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError

LATEST = "latest"
STATE = "trainer_state.json"
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
        save_random_state(folder)
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


def _point_at(folder: Path) -> None:
    if comm.is_main():
        pointer = folder.parent / f"{LATEST}.tmp"
        pointer.write_text(folder.name)
        pointer.replace(folder.parent / LATEST)
