"""Names in a run's folder: its checkpoints, what is left of unfinished ones, and the pointers."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from vembed_ds.durable import replace_text
from vembed_ds.errors import CheckpointError

LATEST = "latest"
BEST = "best"
_CHECKPOINT = re.compile(r"checkpoint-step-(\d+)")
_SHOWN = 100
_LEFTOVER = re.compile(r"\.(checkpoint-step-\d+)\.(partial|replaced|deleted)")


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint that is whole."""
    return f"checkpoint-step-{step}"


def partial_name(name: str) -> str:
    """The folder while it is written."""
    return f".{name}.partial"


def replaced_name(name: str) -> str:
    """An older checkpoint of the same step, while the new one takes its place."""
    return f".{name}.replaced"


def deleted_name(name: str) -> str:
    """A checkpoint that is being deleted."""
    return f".{name}.deleted"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; ``None``: it is none."""
    found = _CHECKPOINT.fullmatch(name)
    return int(found[1]) if found else None


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named as checkpoints; whether they are whole is not looked at.

    Raises:
        OSError: The folder cannot be read.
    """
    if not output_dir.is_dir():
        return []
    return [p for p in output_dir.iterdir() if step_of(p.name) is not None and p.is_dir()]


def leftovers(output_dir: Path) -> list[tuple[Path, str, str]]:
    """What crashes left: the folder, the checkpoint's name, and how it was going on.

    Raises:
        OSError: The folder cannot be read.
    """
    if not output_dir.is_dir():
        return []
    found = ((path, _LEFTOVER.fullmatch(path.name)) for path in sorted(output_dir.iterdir()))
    return [(path, match[1], match[2]) for path, match in found if match]


def read_pointer(output_dir: Path, pointer: str) -> tuple[Path | None, str]:
    """The checkpoint that ``latest`` or ``best`` names.

    Args:
        output_dir: The run's folder.
        pointer: :data:`LATEST` or :data:`BEST`.

    Returns:
        The folder; or ``None`` and what is wrong with the pointer.

    Raises:
        OSError: The folder cannot be looked at.
    """
    path = output_dir / pointer
    try:
        name = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None, f"{path}: missing"
    except (OSError, ValueError) as error:
        return None, f"{path}: cannot be read: {error}"
    if not name:
        return None, f"{path}: empty"
    folder = output_dir / name
    if name == ".." or Path(name).name != name or not _is_folder(folder):
        return None, f"{path}: names {name[:_SHOWN]!r}, which is no folder beside it"
    return folder, ""


def lies_in(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a checkpoint is one of the run in ``output_dir``.

    It may be named by a link there, or be a link to a larger disk; folders may have two names.
    """
    places = (checkpoint.parent, checkpoint.resolve().parent)
    return output_dir.exists() and any(place.samefile(output_dir) for place in places)


def best_checkpoint(output_dir: Path) -> Path:
    """The checkpoint of the best evaluation.

    Raises:
        CheckpointError: The run kept none.
    """
    folder, problem = read_pointer(output_dir, BEST)
    if folder is None:
        raise CheckpointError(
            f"{problem}; train with best_metric, and give the output_dir, to have a best checkpoint"
        )
    return folder


def move_pointer(output_dir: Path, pointer: str, folder: Path) -> None:
    """Let ``latest`` or ``best`` name a checkpoint; a crash leaves the old or the new name.

    Raises:
        OSError: It cannot be written.
    """
    replace_text(output_dir / pointer, folder.name)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a disk that fails says nothing of the name
            raise
        return False
