"""A folder that appears under its name whole, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vembed_ds.durable import describe_write_error, sync_file, sync_folder
from vembed_ds.errors import CheckpointError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the block ends and is removed if it fails.

    It lies beside ``target`` under a hidden name with the host and number of this process. Where a
    process was killed in the middle, the next one for the same target on that host removes what it
    left.

    Args:
        target: A new or empty folder.

    Raises:
        CheckpointError: ``target`` holds something, or it cannot be written.
    """
    refuse_filled(target)
    partial = target.with_name(f"{_prefix(target)}{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target)
        partial.mkdir()
        yield partial
        _sync(partial)
        refuse_filled(target)  # again: another may have been quicker
        partial.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{describe_write_error(error, target)}; nothing of {target.name} was left there. Make "
            "room, or write to another disk"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_filled(target: Path) -> None:
    """See that a folder can be made there.

    Raises:
        CheckpointError: There is something.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(
            f"{target}: exists and is not an empty folder; give a new one, or remove it first"
        )
    place = next(parent for parent in target.absolute().parents if parent.exists())
    if not place.is_dir():
        raise CheckpointError(f"{target}: lies below {place}, which is a file; give another folder")


def refuse_without_space(target: Path, *, size: int) -> None:
    """See that ``size`` bytes fit where ``target`` will be.

    Raises:
        CheckpointError: They do not.
    """
    place = next(parent for parent in target.parents if parent.exists())
    if (free := shutil.disk_usage(place).free) < size:
        raise CheckpointError(
            f"{target}: {size:,} bytes are to be written and {free:,} are free on that disk; make "
            "room, or write to another disk"
        )


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-{socket.gethostname()}-"


def _remove_left(target: Path) -> None:
    for path in target.parent.glob(f"{_escaped(_prefix(target))}*"):
        number = path.name.removeprefix(_prefix(target))
        if re.fullmatch(r"\d+", number) and not _alive(int(number)):
            shutil.rmtree(path)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return process != os.getpid()


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        (sync_folder if path.is_dir() else sync_file)(path)
