"""DeepSpeed's compiled extensions: a folder of our own, built by one rank before the others.

A process that is killed while torch compiles an extension leaves a file ``lock``, and every
later start waits for it for ever without a word. Here every build happens under an operating
system lock, which dies with its process; whoever holds it knows that such a file is stale.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from vembed_ds.distributed import comm

logger = logging.getLogger(__name__)

FOLDER = "TORCH_EXTENSIONS_DIR"


def prepare_extensions() -> Path:
    """Build, once per machine and version, what every start of DeepSpeed loads.

    Collective. Honours ``TORCH_EXTENSIONS_DIR``; the default is a folder per machine, torch and
    DeepSpeed version in the user's cache.

    Returns:
        The folder.
    """
    folder = Path(os.environ.setdefault(FOLDER, str(_default_folder())))
    if comm.local_rank() == 0 and get_accelerator().device_name() == "cpu":
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder / "vembed_ds.lock"):
            remove_stale_locks(folder)
            get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    comm.barrier()
    return folder


def remove_stale_locks(folder: Path) -> list[Path]:
    """Delete torch's ``lock`` files; call it only while no build can be running in ``folder``."""
    stale = list(folder.glob("**/lock"))
    for lock in stale:
        logger.warning("%s was left by a build that was killed; removed", lock)
        lock.unlink()
    return stale


def _default_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    versions = f"torch{torch.__version__}-deepspeed{deepspeed.__version__}"
    return cache / "vembed_ds" / "torch_extensions" / f"{platform.node()}-{versions}"


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
