"""Whether a checkpoint belongs to the run that is about to go on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.consolidate import check_files
from vembed_ds.checkpointing.random_state import random_file
from vembed_ds.checkpointing.store import STATE
from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError

LENGTH = " (num_steps follows from epochs or max_steps, batch_size and the data)"


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
        if not random_file(folder).is_file():
            raise CheckpointError(f"{random_file(folder)}: missing; the checkpoint is incomplete")
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
