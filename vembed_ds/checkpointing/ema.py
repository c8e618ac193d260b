"""The average that an EMA teacher is, in a checkpoint: a file of every rank, never exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError


def save_average(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write this rank's shards. Every rank calls it.

    Args:
        folder: A checkpoint, which exists.
        state: ``[n]`` float32 by name of the parameter.

    Raises:
        OSError: It cannot be written.
    """
    metadata = {"world_size": str(comm.world_size())}
    tensors = {name: shard.cpu().contiguous() for name, shard in state.items()}
    save_file(tensors, _file(folder), metadata=metadata)


def load_average(folder: Path, *, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read what :func:`save_average` wrote on this rank; for ``comm.run_together``.

    Args:
        folder: A checkpoint.
        like: The shards of this run.

    Returns:
        ``[n]`` float32 on the host, by the names of ``like``.

    Raises:
        CheckpointError: The file is missing or damaged, or another number of ranks or another
            model wrote it.
    """
    path = _file(folder)
    _check(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if _shapes(found) != _shapes(like):
        differing = sorted(name for name, _ in _shapes(found) ^ _shapes(like))
        raise CheckpointError(
            f"{path}: holds the average of another model ({differing[0]} differs); resume with "
            "the model it was written with"
        )
    return found


def _check(path: Path) -> None:
    """See that the average of this rank is there, and of as many ranks."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing, so the teacher_ema_decay of this run has no average to go on from; "
            "resume from a whole checkpoint that was written with teacher_ema_decay, or start "
            "afresh from the converted model"
        )
    try:
        with safe_open(path, framework="pt") as file:
            saved = (file.metadata() or {}).get("world_size")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if saved != str(comm.world_size()):
        raise CheckpointError(
            f"{path}: written by {saved} ranks, read by {comm.world_size()}; resume with {saved} "
            "ranks, or start afresh from the converted model"
        )


def _file(folder: Path) -> Path:
    return folder / f"ema_teacher_rank_{comm.rank()}.safetensors"


def _shapes(state: Mapping[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(shard.shape)) for name, shard in state.items()}
