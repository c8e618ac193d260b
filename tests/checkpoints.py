"""What tests ask of a checkpoint: all its weights, whether it is whole, a manifest of its own."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vembed_ds.checkpointing.manifest import (
    Manifest,
    describe_damage,
    find_damage,
    list_files,
    new_manifest,
    read_manifest,
    write_manifest,
)
from vembed_ds.checkpointing.shards import open_checkpoint
from vembed_ds.durable import hash_file
from vembed_ds.errors import CheckpointError


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


def verify(folder: Path) -> Manifest:
    """See that every file of a checkpoint is what was committed. Local; reads all of it.

    Args:
        folder: ``checkpoint-step-N``.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: There is no manifest, or a file is missing or damaged; names the first.
    """
    manifest = read_manifest(folder)
    if damage := find_damage(folder, manifest.files):
        raise CheckpointError(describe_damage(damage))
    return manifest


def seal(folder: Path, *, step: int, world_size: int, zero_stage: int) -> Manifest:
    """Write the manifest of a folder as it lies there. Local; reads all of it.

    For folders that something else than a run of this package wrote.

    Raises:
        OSError: It cannot be read or written.
    """
    manifest = new_manifest(
        {name: hash_file(folder / name) for name in list_files(folder)},
        step=step,
        world_size=world_size,
        zero_stage=zero_stage,
        config_digest=None,
    )
    write_manifest(folder, manifest)
    return manifest
