"""Worlds of fresh processes, and what a process took of memory."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

from vembed_ds.distributed import comm

Result = TypeVar("Result")

# Read when a process starts; torch counts its threads when it is imported, and libgomp lets them
# spin while they wait, which would count as CPU time.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "offline",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # the names of addresses, which a network of its own has not
}
# Imported once, by the server that every CPU rank is forked from.
PRELOADED = ["deepspeed", "transformers", "vembed_ds.training.run"]


class RankError(RuntimeError):
    """A rank of a world failed: its last words, and where it was.

    Attributes:
        report: Its traceback.
    """

    def __init__(self, rank: int, report: str) -> None:
        self.report = report
        lines = [line.strip() for line in report.strip().splitlines()] or ["died"]
        places = [line for line in lines if line.startswith("File ")]
        place = f" ({_short(places[-1])})" if places else ""
        super().__init__(f"rank {rank}: {' '.join(lines[-1].split())}{place}")


def run_ranks(
    function: Callable[..., Result], *arguments: Any, ranks: int, device: str = "cpu"
) -> list[Result]:
    """Call a module's function on every rank of a world that exists for this call only.

    Args:
        function: Called with ``arguments`` in a process of its own, on a CPU of one thread.
        arguments: Sent to it.
        ranks: Size of the world.
        device: ``cpu`` or ``cuda``.

    Returns:
        What each rank returned.

    Raises:
        RankError: Of the first rank that failed; the others are ended.
    """
    on_cpu = device == "cpu"
    # A device may not be in use where processes are forked from.
    context = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
    if on_cpu:
        context.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world, processes = {}, []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()}
        name = f"{function.__module__}:{function.__qualname__}"
        process = context.Process(
            target=_on_rank, args=(theirs, name, arguments, environment, device)
        )
        # The server that ranks are forked from has it from its own start, with the first rank.
        with mock.patch.dict(os.environ, ONE_THREAD | QUIET if on_cpu else QUIET):
            process.start()
        theirs.close()
        world[ours] = rank
        processes.append(process)
    try:
        return _collect(world)
    except BaseException:
        for process in processes:
            process.terminate()  # it may wait for one that failed
        raise
    finally:
        for connection in world:
            connection.close()
        for process in processes:
            process.join()


def _collect(world: dict[Connection, int]) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(world)
    while waiting:
        for connection in wait(list(waiting)):
            rank = waiting.pop(connection)
            try:
                succeeded, answer = connection.recv()
            except EOFError:
                succeeded, answer = False, ""
            if not succeeded:
                raise RankError(rank, answer)
            results[rank] = answer
    return [results[rank] for rank in sorted(results)]


def _on_rank(
    answers: Connection,
    name: str,
    arguments: Sequence[Any],
    environment: dict[str, str],
    device: str,
) -> None:
    os.environ.update(environment)
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        comm.init_distributed(device_type=device, timeout_minutes=5)
        module, _, attribute = name.partition(":")
        answers.send((True, getattr(importlib.import_module(module), attribute)(*arguments)))
    except BaseException:  # noqa: BLE001 (whatever it is, the parent reports it)
        answers.send((False, traceback.format_exc()))
    with suppress(EOFError):
        answers.recv()  # nobody leaves the world while another may need it


def _short(place: str) -> str:
    """``package/module.py, line 7`` of a line of a traceback."""
    path, _, rest = place.removeprefix('File "').partition('"')
    return "/".join(Path(path).parts[-3:]) + rest.partition(", in ")[0]


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
