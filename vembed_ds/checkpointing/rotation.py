"""What is removed from a run's folder: superseded checkpoints, and what crashes left."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from vembed_ds.checkpointing.manifest import deleting, read_manifest
from vembed_ds.checkpointing.names import (
    BEST,
    LATEST,
    checkpoints,
    deleted_name,
    leftovers,
    read_pointer,
    replaced_name,
)
from vembed_ds.durable import sync_folder
from vembed_ds.errors import CheckpointError

logger = logging.getLogger(__name__)


def by_age(folders: Collection[Path]) -> list[Path]:
    """Checkpoints with a readable manifest, the last written first.

    Not by step: a run that went on from an earlier checkpoint has later steps behind it.
    """
    dated = []
    for folder in folders:
        try:
            dated.append((read_manifest(folder).written_at, folder.name, folder))
        except CheckpointError:
            continue
    return [folder for *_, folder in sorted(dated, reverse=True)]


def latest_time(output_dir: Path) -> float:
    """When the checkpoint that ``latest`` names was written; 0: nobody knows."""
    folder, _ = read_pointer(output_dir, LATEST)
    try:
        return 0.0 if folder is None else read_manifest(folder).written_at
    except CheckpointError:
        return 0.0


def rotate(output_dir: Path, *, total_limit: int) -> list[Path]:
    """Delete all but the newest checkpoints. Rank 0, after ``latest`` has moved.

    What ``latest`` and ``best`` name stays, whatever its age; so does what somebody reads now,
    and what has no readable manifest, because nobody knows what it is.

    Args:
        output_dir: The run's folder.
        total_limit: How many of the newest are kept; > 0.

    Returns:
        What was deleted.

    Raises:
        OSError: Something cannot be deleted; nothing is left half under a checkpoint's name.
    """
    pointed = {read_pointer(output_dir, pointer)[0] for pointer in (LATEST, BEST)}
    deleted = []
    for folder in by_age(checkpoints(output_dir))[total_limit:]:
        if folder in pointed:
            continue
        with deleting(folder) as free:
            if free:
                delete_checkpoint(folder)
                deleted.append(folder)
            else:
                logger.info("%s: is being read, so it is not deleted yet", folder)
    return deleted


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; a crash leaves it whole, or under another name. Rank 0.

    Raises:
        OSError: It cannot be deleted.
    """
    doomed = folder.with_name(deleted_name(folder.name))
    if os.path.lexists(doomed):
        _remove(doomed)
    folder.rename(doomed)
    sync_folder(folder.parent)
    _remove(doomed)


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a finished checkpoint its name, which an older one may have. Rank 0.

    :func:`confirm` must follow.

    Raises:
        OSError: It cannot be renamed.
    """
    older = folder.with_name(replaced_name(folder.name))
    if os.path.lexists(folder):  # a link to a disk that is not there is in the way, too
        if os.path.lexists(older):
            _remove(older)
        folder.rename(older)
    # A crash here leaves the older one under its other name, and put_back gives it back.
    partial.rename(folder)


def confirm(folder: Path) -> None:
    """Flush a checkpoint's new name to the disk, and delete the one that had it before. Rank 0.

    Raises:
        OSError: The name did not get there.
    """
    sync_folder(folder.parent)
    older = folder.with_name(replaced_name(folder.name))
    try:
        if os.path.lexists(older):
            _remove(older)
    except OSError as error:
        _warn_of_leftover(older, error)


def put_back(output_dir: Path) -> None:
    """Give checkpoints their name back that a crash left without a successor. Rank 0.

    Raises:
        OSError: It cannot be renamed.
    """
    for path, name, state in leftovers(output_dir):
        if state == "replaced" and not (output_dir / name).exists():
            path.rename(output_dir / name)
            logger.warning("%s: was being replaced when a run crashed; it has its name back", name)


def remove_leftovers(output_dir: Path, *, needed: str | None = None) -> None:
    """Report and remove what crashed runs left unfinished. Rank 0 of the run that has the folder.

    What cannot be removed (NFS keeps files that somebody has open) is warned of and stays.

    Args:
        output_dir: The run's folder.
        needed: Name of a folder that must be gone afterwards.

    Raises:
        OSError: That one cannot be removed, or a checkpoint not get its name back.
    """
    put_back(output_dir)
    for path, name, state in leftovers(output_dir):
        try:
            _remove(path)
        except OSError as error:
            if path.name == needed:
                raise
            _warn_of_leftover(path, error)
            continue
        what = {
            "partial": "a checkpoint that a run had not finished when it ended",
            "replaced": "an older checkpoint of the same step",
            "deleted": "a checkpoint that was being deleted when a run ended",
        }[state]
        logger.warning("%s: removed %s (%s)", output_dir, path.name, what.format(name=name))


def _remove(folder: Path) -> None:
    """What a link leads to lies elsewhere, where somebody has put it, and stays."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _warn_of_leftover(path: Path, error: OSError) -> None:
    logger.warning(
        "%s: cannot be removed (%s: %s), and is in nobody's way; it is tried again at the next "
        "checkpoint",
        path,
        error.filename or path.name,
        error.strerror or error,
    )
