"""What the ranks of a run find together: devices, extensions, one folder, one time, an exchange.

Everything but :func:`devices` and :func:`extensions` is collective, and gives on every rank the
findings of all.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from vembed_ds.distributed import comm
from vembed_ds.engine.extensions import OLDEST_BUILD_SECONDS, extensions_folder, lock_ages
from vembed_ds.errors import counted
from vembed_ds.preflight.facts import facts
from vembed_ds.preflight.findings import FAIL, WARN, Finding
from vembed_ds.preflight.machine import existing

CLOCK_SECONDS = 2.0
LOOK_SECONDS = 10.0  # file servers may show a new file late
EXCHANGED_MIB = 16
ROUNDS = 3
_MIB = 2**20


def devices() -> Finding:
    """What torch and DeepSpeed see on this machine."""
    accelerator = get_accelerator()
    kind, count = accelerator.device_name(), accelerator.device_count()
    there = torch.accelerator.device_count()
    if kind == "cpu":
        cores = len(os.sched_getaffinity(0))
        if there:
            finding = f"DeepSpeed uses the CPU, though torch sees {counted(there, 'accelerator')}"
            return Finding("devices", finding, WARN, "unset DS_ACCELERATOR, unless you want that")
        return Finding("devices", f"no accelerator; DeepSpeed uses {counted(cores, 'CPU core')}")
    names = sorted({accelerator.get_device_name(index) for index in range(count)})
    libraries = f"CUDA {torch.version.cuda}, NCCL {_nccl()}" if kind == "cuda" else kind
    finding = f"{count} x {', '.join(names)}; {libraries}"
    if count != there:
        return Finding("devices", f"{finding}; torch sees {there}", WARN, "look at DS_ACCELERATOR")
    return Finding("devices", finding)


def _nccl() -> str:
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def extensions() -> Finding:
    """Whether DeepSpeed's extensions can be built, or a build that was killed is in the way."""
    folder = extensions_folder()
    place = existing(folder)
    if not os.access(place, os.W_OK):
        remedy = "let TORCH_EXTENSIONS_DIR name a folder that can be written to"
        return Finding("extensions", f"{folder} cannot be made or written to", FAIL, remedy)
    ages = lock_ages(folder)
    if not ages:
        return Finding("extensions", f"{folder}: no build under way")
    lock, age = max(ages.items(), key=lambda found: found[1])
    if age > OLDEST_BUILD_SECONDS:
        remedy = "no build takes so long: it was killed; remove the file"
        return Finding("extensions", f"{lock} is {age / 60:.0f} minutes old", FAIL, remedy)
    finding = f"somebody builds, or was killed {age:.0f} s ago: {lock}"
    return Finding("extensions", finding, WARN, "look again in a minute")


def of_all_machines(findings: Sequence[Finding]) -> list[Finding]:
    """The findings of the first rank of every machine, with its name. Collective."""
    own = list(findings) if comm.local_rank() == 0 else []
    named = [finding._replace(host=platform.node()) for finding in own]
    return [finding for found in comm.all_gather_objects(named) for finding in found]


def alike() -> Finding:
    """Whether all ranks run the same versions and code. Collective."""
    found = comm.all_gather_objects((platform.node(), facts()["versions"]))
    _, first = found[0]
    differing = sorted(
        {
            f"{host} has {name} {versions[name]} and not {first[name]}"
            for host, versions in found
            for name in first
            if versions[name] != first[name]
        }
    )
    if differing:
        remedy = "install the same everywhere (constraints.txt), and copy the same code"
        return Finding("versions", "; ".join(differing), FAIL, remedy)
    return Finding("versions", f"the same on {counted(comm.world_size(), 'rank')}")


def clocks() -> Finding:
    """How far the machines' clocks are apart. Collective."""
    comm.barrier()
    found = comm.all_gather_objects((platform.node(), time.time()))
    earliest, latest = min(found, key=lambda one: one[1]), max(found, key=lambda one: one[1])
    apart = latest[1] - earliest[1]
    if apart > CLOCK_SECONDS:
        finding = f"{latest[0]} is {apart:.0f} s before {earliest[0]}"
        remedy = "set them by NTP (chrony, systemd-timesyncd): file times and logs are compared"
        return Finding("clocks", finding, WARN, remedy)
    return Finding("clocks", f"within {CLOCK_SECONDS:g} s")


def shared_folder(folder: Path) -> Finding:
    """Whether all ranks see what rank 0 writes where results will be. Collective."""
    place, name = comm.all_gather_objects(
        (existing(folder), f".vembed-doctor-{secrets.token_hex(8)}")
    )[0]
    file = place / name
    problem = comm.all_gather_objects(_write(file) if comm.is_main() else None)[0]
    if problem:
        remedy = "choose another output_dir, or mend its rights"
        return Finding(
            "shared folder", f"{place}: rank 0 cannot write there: {problem}", FAIL, remedy
        )
    seen = comm.all_gather_objects((platform.node(), _appears(file)))
    if comm.is_main():
        file.unlink()
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        remedy = (
            "let output_dir be on a disk that all machines share, or set node_local_output: true"
        )
        finding = f"{place} is another folder on {', '.join(blind)}"
        return Finding("shared folder", finding, FAIL, remedy)
    return Finding("shared folder", f"{place}: a file of rank 0 is seen by all")


def _write(file: Path) -> str | None:
    """What kept the file from being written."""
    try:
        file.write_text(file.name)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + LOOK_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def exchange() -> Finding:
    """Mean of a tensor over all ranks, on the device that training uses: right, and how fast. Collective."""
    accelerator = get_accelerator()
    device = accelerator.current_device_name() if accelerator.device_name() != "cpu" else "cpu"
    ranks = comm.world_size()
    tensor = torch.full((EXCHANGED_MIB * _MIB // 4,), float(comm.rank()), device=device)
    seconds = []
    for _ in range(ROUNDS):  # the first makes the connections
        comm.barrier()
        started = time.monotonic()
        mean = comm.mean_over_ranks(tensor)
        wrong = int((mean != (ranks - 1) / 2).sum())  # waits for the device
        seconds.append(time.monotonic() - started)
    [most] = comm.all_max([wrong])
    if most:
        finding = f"{most} of {tensor.numel()} sums over {ranks} ranks are wrong"
        return Finding("all-reduce", finding, FAIL, "look for broken memory or network hardware")
    backend = "gloo" if device == "cpu" else "nccl"
    speed = EXCHANGED_MIB / min(seconds)
    return Finding("all-reduce", f"{ranks} ranks, {backend}: right; {speed:,.0f} MiB/s of a tensor")
