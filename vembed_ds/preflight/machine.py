"""What one machine brings to a run: packages, disk, models, compiler, shared memory."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from vembed_ds.preflight.facts import installed_version
from vembed_ds.preflight.findings import FAIL, WARN, Finding

DISTRIBUTION = "vembed-ds"
SHOWN = ("torch", "deepspeed", "transformers")
SCARCE_DISK_GIB = 20  # a checkpoint of 1 billion parameters takes some 16
SCARCE_SHARED_MIB = 1024  # a container begins with 64, and loader processes end by SIGBUS
_GIB, _MIB = 2**30, 2**20


def packages() -> Finding:
    """Whether every package that this one declares is installed, in its range."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        remedy = "run `pip install -c constraints.txt -e .` in its folder"
        finding = (
            f"{DISTRIBUTION} is not installed, only found on the path: nothing states its needs"
        )
        return Finding("packages", finding, WARN, remedy)
    needed = [Requirement(text) for text in declared]
    needed = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    wrong = [
        f"{need.name} {found} (needs {need.specifier})"
        for need in needed
        if not need.specifier.contains(found := installed_version(need.name), prereleases=True)
    ]
    if wrong:
        remedy = f"pip install '{DISTRIBUTION}' again, with constraints.txt"
        return Finding("packages", f"not in the declared range: {', '.join(wrong)}", FAIL, remedy)
    shown = ", ".join(f"{name} {installed_version(name)}" for name in SHOWN)
    finding = f"python {platform.python_version()}, {shown}; all {len(needed)} in their ranges"
    return Finding("packages", finding)


def disk(folder: Path) -> Finding:
    """Whether ``folder``, or what exists above it, can be written to, and has room."""
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free / _GIB
    except OSError as error:
        finding = f"{place} cannot be written to: {error.strerror}"
        return Finding("disk", finding, FAIL, "choose another output_dir, or mend its rights")
    finding = f"{free:,.0f} GiB free in {place}"
    if free < SCARCE_DISK_GIB:
        remedy = "make room, or set save_total_limit; a full disk ends a run (on_save_error)"
        return Finding("disk", finding, WARN, remedy)
    return Finding("disk", finding)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    path = folder.resolve()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def shared_memory(place: Path = Path("/dev/shm")) -> Finding:
    """Whether loader processes have room to hand batches over."""
    if not place.is_dir():
        return Finding("shared memory", f"no {place} on this system")
    size = shutil.disk_usage(place).total / _MIB
    finding = f"{size:,.0f} MiB in {place}"
    if size < SCARCE_SHARED_MIB:
        remedy = "give the container more (docker run --shm-size 16g, or --ipc host; Kubernetes: an emptyDir of medium Memory), or set num_workers: 0"
        return Finding("shared memory", finding, WARN, remedy)
    return Finding("shared memory", finding)


def hub() -> Finding:
    """Where models come from, and whether that is asked for offline."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    if constants.HF_HUB_OFFLINE:
        finding = f"offline (HF_HUB_OFFLINE), {models} models in {cache}"
        return Finding("Hugging Face", finding)
    finding = f"online: every rank asks the hub; {models} models in {cache}"
    remedy = "on clusters: download once into a shared HF_HOME, then set HF_HUB_OFFLINE=1"
    return Finding("Hugging Face", finding, WARN, remedy)


def model(name: str) -> Finding:
    """Whether a model that a configuration names is on this machine."""
    from huggingface_hub import constants, try_to_load_from_cache

    if name.startswith("package:") or Path(name).is_dir():
        return Finding("model", f"{name} is here")
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return Finding("model", f"{name} is in the cache")
    remedy = f"download it first: hf download {name}"
    state = FAIL if constants.HF_HUB_OFFLINE else WARN
    return Finding("model", f"{name} is no folder here, and not in the cache", state, remedy)


def compiler() -> Finding:
    """Whether what DeepSpeed and torch compile could be compiled."""
    found = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    if found is None:
        remedy = (
            "install a C++ compiler (Debian: build-essential) before using an offloaded optimizer or "
            "use_torch_compile; nothing else needs one"
        )
        return Finding("compiler", "none (c++, g++)", WARN, remedy)
    return Finding("compiler", found)
