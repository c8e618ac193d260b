"""What a checkpoint says of the run that wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.store import STATE
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
