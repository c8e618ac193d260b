"""DeepSpeed's compiled extensions: a folder of our own, built by one rank before the others.

A process that is killed while torch compiles an extension leaves a file ``lock``, and every
later start waits for it for ever without a word. Here every job holds an operating system lock on
the folder, which dies with its processes: who has it alone knows that such a file is stale.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError

logger = logging.getLogger(__name__)

FOLDER = "TORCH_EXTENSIONS_DIR"
OLDEST_BUILD_SECONDS = 15 * 60
_HELD: dict[Path, TextIO] = {}  # open for as long as the process lives


def prepare_extensions(ds_config: Mapping[str, Any]) -> Path:
    """Build, once per machine and version, what DeepSpeed compiles for this configuration.

    Collective. Honours ``TORCH_EXTENSIONS_DIR``; the default is a folder per machine, torch and
    DeepSpeed version in the user's cache.

    Args:
        ds_config: The resolved DeepSpeed config.

    Returns:
        The folder.
    """
    folder = Path(os.environ.setdefault(FOLDER, str(_default_folder())))
    folder.mkdir(parents=True, exist_ok=True)
    names = needed_extensions(ds_config) if comm.local_rank() == 0 else []
    comm.run_together(lambda: _build(folder, names), doing=f"building {names} in {folder}")
    _hold(folder, fcntl.LOCK_SH)
    return folder


def _build(folder: Path, names: list[str]) -> None:
    if not names:
        return
    # Only alone in the folder: every start of DeepSpeed takes torch's lock for a moment.
    if _hold(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        remove_stale_locks(folder)
    else:
        refuse_old_locks(folder)
    for name in names:
        get_accelerator().create_op_builder(name).load(verbose=False)


def _hold(folder: Path, kind: int) -> bool:
    """Take the folder's lock, shared or exclusive, until this process ends."""
    if folder not in _HELD:
        _HELD[folder] = (folder / "vembed_ds.lock").open("w")
    try:
        fcntl.flock(_HELD[folder], kind)
    except BlockingIOError:
        return False
    return True


def refuse_old_locks(folder: Path) -> None:
    """Name a lock that no build can still be holding; torch would wait for it for ever.

    Raises:
        VembedError: A ``lock`` older than any compilation takes.
    """
    for lock in folder.glob("**/lock"):
        age = _age_seconds(lock)
        if age is not None and age > OLDEST_BUILD_SECONDS:
            raise VembedError(
                f"{lock} is {age / 60:.0f} minutes old: a build was killed and left it, and DeepSpeed "
                "would wait for it for ever; end the other jobs on this machine that are "
                "starting, and remove the file"
            )


def needed_extensions(ds_config: Mapping[str, Any]) -> list[str]:
    """Names of DeepSpeed's builders that this configuration loads."""
    # On a CPU, ranks of one machine meet in shared memory.
    names = ["ShareMemCommBuilder"] if get_accelerator().device_name() == "cpu" else []
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    optimizer = ds_config.get("optimizer", {})
    by_torch = optimizer.get("params", {}).get("torch_adam", False)
    is_adam = str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    if offload.get("device", "none") != "none" and is_adam and not by_torch:
        names.append("CPUAdamBuilder")
    return names


def remove_stale_locks(folder: Path) -> list[Path]:
    """Delete torch's ``lock`` files; call it only while no build can be running in ``folder``."""
    stale = list(folder.glob("**/lock"))
    for lock in stale:
        logger.warning("%s was left by a build that was killed; removed", lock)
        lock.unlink(missing_ok=True)
    return stale


def _age_seconds(file: Path) -> float | None:
    """Since its last change; ``None``: whoever built has just removed it."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return None


def _default_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    versions = (
        f"python{platform.python_version()}-torch{torch.__version__}"
        f"-deepspeed{deepspeed.__version__}"
    )
    return cache / "vembed_ds" / "torch_extensions" / f"{platform.node()}-{versions}"
