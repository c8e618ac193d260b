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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from vembed_ds.distributed import comm

logger = logging.getLogger(__name__)

FOLDER = "TORCH_EXTENSIONS_DIR"


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
    if comm.local_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder / "vembed_ds.lock"):
            remove_stale_locks(folder)
            for name in needed_extensions(ds_config):
                get_accelerator().create_op_builder(name).load(verbose=False)
    comm.barrier()
    return folder


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
        lock.unlink()
    return stale


def _default_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    versions = (
        f"python{platform.python_version()}-torch{torch.__version__}"
        f"-deepspeed{deepspeed.__version__}"
    )
    return cache / "vembed_ds" / "torch_extensions" / f"{platform.node()}-{versions}"


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
