"""The average that an EMA teacher is, in a checkpoint: a file of every rank, never exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError


def save_average(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write this rank's shards. Every rank calls it.

    Args:
        folder: A checkpoint, which exists.
        state: ``[n]`` float32 by name of the parameter: the rank's piece of the flattened
            parameter, which ZeRO-3 cuts into equal ones.

    Raises:
        OSError: It cannot be written.
    """
    metadata = {"world_size": str(comm.world_size())}
    tensors = {name: shard.cpu().contiguous() for name, shard in state.items()}
    save_file(tensors, _file(folder, comm.rank()), metadata=metadata)


def load_average(folder: Path, *, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read this rank's shards, whatever number of ranks wrote them; for ``comm.run_together``.

    On the same number of ranks, what :func:`save_average` wrote on this rank; else the shards lie
    in several ranks' files, of which only those ranges are read.

    Args:
        folder: A checkpoint.
        like: The shards of this run.

    Returns:
        ``[n]`` float32 on the host, by the names of ``like``.

    Raises:
        CheckpointError: A file is missing or damaged, or another model's.
    """
    saved = _number_of_ranks(folder)
    same = saved == comm.world_size()
    paths = [_file(folder, rank) for rank in ([comm.rank()] if same else range(saved))]
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in paths]
        if differing := sorted(files[0].keys() ^ like.keys()):
            raise _of_another_model(paths[0], differing[0])
        found = {}
        for name, shard in like.items():
            pieces = [file.get_slice(name) for file in files]
            found[name] = pieces[0][:] if same else _own_piece(pieces)
            if found[name].shape != shard.shape:
                raise _of_another_model(paths[0], name)
    return found


def _own_piece(pieces: Sequence[Any]) -> Tensor:
    """This rank's equal part of a flattened parameter, from the parts of other ranks."""
    lengths = [piece.get_shape()[0] for piece in pieces]
    length = -(-sum(lengths) // comm.world_size())
    start, parts = length * comm.rank(), []
    for piece, own in zip(pieces, lengths, strict=True):
        parts.append(piece[min(max(start, 0), own) : min(max(start + length, 0), own)])
        start -= own
    return torch.cat(parts)


def _number_of_ranks(folder: Path) -> int:
    """How many wrote it."""
    own, first = _file(folder, comm.rank()), _file(folder, 0)
    known = next((path for path in (own, first) if path.is_file()), None)
    if known is None:
        raise CheckpointError(
            f"{own}: missing, so the teacher_ema_decay of this run has no average to go on from; "
            "resume from a whole checkpoint that was written with teacher_ema_decay, or start "
            "afresh from the converted model"
        )
    with _opened(known) as file:
        return int((file.metadata() or {}).get("world_size", 1))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; resume from a whole checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def _of_another_model(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds the average of another model ({name} differs); resume with the model it "
        "was written with"
    )


def _file(folder: Path, rank: int) -> Path:
    return folder / f"ema_teacher_rank_{rank}.safetensors"
