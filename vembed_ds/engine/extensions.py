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
QUIET_SECONDS = 10.0  # every start takes torch's lock for a moment
POLL_SECONDS = 0.5
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
    folder = extensions_folder()
    os.environ[FOLDER] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = needed_extensions(ds_config) if comm.local_rank() == 0 else []
    comm.run_together(lambda: _build(folder, names), doing=f"building {names} in {folder}")
    _hold(folder, fcntl.LOCK_SH)
    return folder


def extensions_folder() -> Path:
    """``TORCH_EXTENSIONS_DIR``, else a folder per machine, torch and DeepSpeed version."""
    return Path(os.environ.get(FOLDER) or _default_folder())


def _build(folder: Path, names: list[str]) -> None:
    if not names:
        return
    # Only alone in the folder: every start of DeepSpeed takes torch's lock for a moment.
    if _hold(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        remove_stale_locks(folder)
    else:
        wait_for_builds(folder)
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


def wait_for_builds(folder: Path) -> None:
    """Wait for what other jobs build, and say so; torch would wait without a word, and for ever.

    Raises:
        VembedError: A ``lock`` older than any compilation takes.
    """
    started, told = time.monotonic(), False
    while ages := lock_ages(folder):
        lock, age = max(ages.items(), key=lambda found: found[1])
        if age > OLDEST_BUILD_SECONDS:
            raise VembedError(
                f"{lock} is {age / 60:.0f} minutes old: a build was killed and left it, and DeepSpeed "
                "would wait for it for ever; end the other jobs on this machine that are "
                "starting, and remove the file"
            )
        if not told and time.monotonic() - started > QUIET_SECONDS:
            told = True
            logger.warning(
                "%s: waiting until another job has built this; if none is building, end the other "
                "jobs on this machine and remove the file (it is given up at an age of %d minutes)",
                *(lock, OLDEST_BUILD_SECONDS // 60),
            )
        time.sleep(POLL_SECONDS)


def lock_ages(folder: Path) -> dict[Path, float]:
    """Torch's ``lock`` files, and how many seconds old they are."""
    found = {lock: _age_seconds(lock) for lock in folder.glob("**/lock")}
    return {lock: age for lock, age in found.items() if age is not None}


def needed_extensions(ds_config: Mapping[str, Any]) -> list[str]:
    """Names of DeepSpeed's builders that this configuration loads."""
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    optimizer = ds_config.get("optimizer", {})
    by_torch = optimizer.get("params", {}).get("torch_adam", False)
    is_adam = str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    offloaded = offload.get("device", "none") != "none"
    return ["CPUAdamBuilder"] if offloaded and is_adam and not by_torch else []


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
