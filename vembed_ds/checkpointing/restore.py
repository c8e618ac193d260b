"""A checkpoint's weights, optimizer, schedule and random state, put back into an engine."""

from __future__ import annotations

import pickle
from pathlib import Path

from deepspeed.runtime.engine import DeepSpeedEngine

from vembed_ds.checkpointing.random_state import load_random_state
from vembed_ds.errors import CheckpointError, one_line


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
    load_random_state(folder)
