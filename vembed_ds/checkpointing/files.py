"""Which files a checkpoint has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.names import LATEST, read_pointer
from vembed_ds.errors import CheckpointError
from vembed_ds.models.saved_folder import SETTINGS_FILE

MODEL_FOLDER = "model"
PARAMETERS_FILE = "parameters.json"
FACTS_FILE = "training.json"
MODEL_STATES = "mp_rank_00_model_states.pt"
OPTIMIZER_STATES = "mp_rank_00_optim_states.pt"


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that ``path`` is, or that its ``latest`` file names.

    Args:
        path: ``<output_dir>/checkpoint-step-<N>``, or ``<output_dir>``.

    Raises:
        CheckpointError: No such folder, or nothing in it that DeepSpeed wrote.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder; check the path")
    folder = _latest(path) if (path / LATEST).is_file() else path
    if not any(folder.glob("*_model_states.pt")):
        if (folder / PARAMETERS_FILE).is_file():
            raise CheckpointError(
                f"{folder}: describes a checkpoint's model, and lacks what was trained; give "
                f"the checkpoint, {folder.absolute().parent}"
            )
        if (folder / SETTINGS_FILE).is_file():
            raise CheckpointError(
                f"{folder}: is a converted model already ({SETTINGS_FILE}); use it as it is, or give "
                "a checkpoint-step-N folder or the output_dir that holds them"
            )
        raise CheckpointError(
            f"{folder}: no DeepSpeed checkpoint (*_model_states.pt) and no file `latest`; give a "
            "checkpoint-step-N folder or the output_dir that holds them"
        )
    return folder


def check_files(checkpoint: Path, *, zero_stage: int, world_size: int) -> None:
    """See that every file is there that ``world_size`` ranks write at ``zero_stage``.

    Raises:
        CheckpointError: A file is missing; names it.
    """
    if zero_stage < 3:
        existing(checkpoint / MODEL_STATES)
    for rank in range(world_size):
        if zero_stage == 3:
            shard_file(checkpoint, MODEL_STATES, rank, world_size)
        if zero_stage > 0:
            shard_file(checkpoint, OPTIMIZER_STATES, rank, world_size)


def read_parameters(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What ``describe_model`` noted about every parameter and persistent buffer.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = checkpoint / MODEL_FOLDER / PARAMETERS_FILE
    try:
        parameters: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    return parameters


def shard_file(checkpoint: Path, suffix: str, rank: int, world_size: int) -> Path:
    """The file that one rank wrote.

    Args:
        checkpoint: The folder.
        suffix: :data:`MODEL_STATES` (of ZeRO-3) or :data:`OPTIMIZER_STATES` (of ZeRO-1 to 3).
        rank: Whose.
        world_size: Number of ranks that wrote the checkpoint.

    Raises:
        CheckpointError: It is missing.
    """
    file = _written(checkpoint, suffix, rank)
    if file is None:
        found = sum(_written(checkpoint, suffix, other) is not None for other in range(world_size))
        bf16 = suffix == OPTIMIZER_STATES and any(checkpoint.glob("bf16_zero_pp_rank_*"))
        raise CheckpointError(
            f"{checkpoint / _name(suffix, rank, 'bf16_' if bf16 else '')}: missing; {world_size} "
            f"ranks wrote this checkpoint and {found} of their {world_size} files *_{suffix} are "
            "here. Copy the folder from every node, or take an earlier checkpoint"
        )
    return file


def _written(checkpoint: Path, suffix: str, rank: int) -> Path | None:
    prefixes = ("", "bf16_") if suffix == OPTIMIZER_STATES else ("",)
    files = (checkpoint / _name(suffix, rank, prefix) for prefix in prefixes)
    return next((file for file in files if file.is_file()), None)


def _name(suffix: str, rank: int, prefix: str) -> str:
    return f"{prefix}zero_pp_rank_{rank}_{suffix}"


def existing(path: Path) -> Path:
    """``path``, which a whole checkpoint has.

    Raises:
        CheckpointError: It is missing.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete")
    return path


def _latest(path: Path) -> Path:
    folder, problem = read_pointer(path, LATEST)
    if folder is None:
        raise CheckpointError(f"{problem}; give a checkpoint-step-N folder instead")
    return folder
