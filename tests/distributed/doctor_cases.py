"""Ranks that find something wrong together."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import torch

from vembed_ds.distributed import comm
from vembed_ds.preflight import world
from vembed_ds.preflight.findings import Finding


def all_well(*, folder: str) -> list[Finding]:
    return [world.alike(), world.clocks(), world.shared_folder(Path(folder)), world.exchange()]


def on_rank_1(finding: str) -> Finding:
    """What all find, when only rank 1 is different."""
    different = comm.rank() == 1
    if finding == "clocks":
        now = time.time()
        with mock.patch.object(world.time, "time", return_value=now + 60 * different):
            return world.clocks()
    if finding == "alike":
        found = world.facts()
        found["versions"]["torch"] += ".old" * different
        with mock.patch.object(world, "facts", return_value=found):
            return world.alike()
    mean = comm.mean_over_ranks
    with mock.patch.object(comm, "mean_over_ranks", lambda value: mean(value) + different):
        return world.exchange()


def blind(*, folder: str) -> Finding:
    """Rank 1 does not see what rank 0 wrote."""
    with mock.patch.object(world, "_appears", lambda file: comm.rank() == 0 and file.exists()):
        return world.shared_folder(Path(folder))


def unwritable(*, folder: str) -> Finding:
    with mock.patch.object(Path, "write_text", side_effect=PermissionError(13, "no permission")):
        return world.shared_folder(Path(folder))


def of_machines() -> list[str]:
    """As on two machines with one rank each, then as on one with two."""
    finding = Finding("disk", f"of rank {comm.rank()}")
    with mock.patch.object(comm, "local_rank", return_value=0):
        two = world.of_all_machines([finding])
    one = world.of_all_machines([finding])
    return [found.finding for found in (*two, *one)]


def accelerators(*, kind: str, counted: int, seen: int) -> Finding:
    """What is said of a machine whose accelerators are pretended."""
    accelerator = mock.Mock()
    accelerator.device_name.return_value = kind
    accelerator.device_count.return_value = counted
    accelerator.get_device_name.return_value = "X200"
    with (
        mock.patch.object(world, "get_accelerator", return_value=accelerator),
        mock.patch.object(torch.accelerator, "device_count", return_value=seen),
        mock.patch.object(world, "_nccl", return_value="2.27"),
    ):
        return world.devices()
