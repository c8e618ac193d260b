"""What a checkpoint says of the run that wrote it."""

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


def read_state(folder: Path) -> dict[str, Any]:
    """The plain values that :func:`save_checkpoint` wrote; ``step`` is among them.

    Args:
        folder: From :func:`find_checkpoint`.

    Raises:
        CheckpointError: They cannot be read.
    """
    path = folder / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        int(state["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); resume from an earlier checkpoint-step-N folder"
        ) from error
    return state


def check_loadable(folder: Path, *, state: Mapping[str, Any], zero_stage: int) -> None:
    """See that this rank's files are there, and of the same ranks and stage.

    Args:
        folder: From :func:`find_checkpoint`.
        state: From :func:`read_state`.
        zero_stage: Of this run.

    Raises:
        CheckpointError: Another topology, or a file is missing.
    """
    now = {"world_size": comm.world_size(), "zero_stage": zero_stage}
    changed = [
        f"{key} was {state.get(key)}, is {now[key]}" for key in now if state.get(key) != now[key]
    ]
    if changed:
        raise CheckpointError(
            f"{folder}: {'; '.join(changed)}; resume with what it was written with"
        )
    if not random_file(folder).is_file():
        raise CheckpointError(f"{random_file(folder)}: missing; the checkpoint is incomplete")
    check_files(folder, zero_stage=zero_stage, world_size=comm.world_size())
