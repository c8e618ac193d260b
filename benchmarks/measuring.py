"""Worlds of fresh processes, and what a process took of memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from vembed_ds.distributed import comm

Result = TypeVar("Result")

# Read before a process is started; torch counts its threads when it is imported.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
# Imported once, by the server that every rank is forked from.
PRELOADED = ["deepspeed", "transformers", "vembed_ds.training.run"]


def run_ranks(function: Callable[..., Result], *arguments: Any, ranks: int) -> list[Result]:
    """Call a module's function on every rank of a world that exists for this call only.

    Args:
        function: Called with ``arguments`` in a CPU process of one thread.
        arguments: Sent to it.
        ranks: Size of the world.

    Returns:
        What each rank returned.
    """
    os.environ.update(ONE_THREAD)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call = partial(_on_rank, function, arguments, ranks, port)
    with ProcessPoolExecutor(ranks, mp_context=context) as pool:
        return list(pool.map(call, range(ranks)))


def _on_rank(
    function: Callable[..., Result], arguments: Sequence[Any], ranks: int, port: int, rank: int
) -> Result:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    comm.init_distributed(device_type="cpu", timeout_minutes=5)
    return function(*arguments)


def reset_peak() -> int:
    """Give back what was freed, and forget the peak: from now on ``VmHWM`` is the most since.

    Returns:
        Kilobytes that the process holds.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    """Kilobytes of a line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))
