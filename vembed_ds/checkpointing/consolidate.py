"""A checkpoint as one float32 state dict, for every ZeRO stage and precision."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vembed_ds.checkpointing.files import (
    MODEL_FOLDER,
    PARAMETERS_FILE,
    check_files,
    read_parameters,
    resolve_checkpoint,
)
from vembed_ds.checkpointing.shards import open_checkpoint

__all__ = [
    "MODEL_FOLDER",
    "PARAMETERS_FILE",
    "check_files",
    "load_consolidated",
    "read_parameters",
    "resolve_checkpoint",
]


def load_consolidated(checkpoint: Path) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of the trained model, whole.

    For models that fit into memory; ``shards.open_checkpoint`` gives one tensor at a time.

    Args:
        checkpoint: As in :func:`resolve_checkpoint`.

    Returns:
        By name in the trained module: tensors on the CPU, float32 where floating. Names of one
        shared parameter give one and the same tensor.

    Raises:
        CheckpointError: Missing, incomplete or damaged files; names the file.
    """
    reader = open_checkpoint(checkpoint)
    reader.check_whole()
    first = [name for name in reader.names() if name not in reader.aliases]
    weights = {name: reader.weight(name) for name in first}
    return {name: weights[reader.aliases.get(name, name)] for name in reader.names()}
