"""Small worlds of CPU ranks that stay up and are sent cases (starting one costs 10-20 s)."""

from __future__ import annotations

import gc
import importlib
import os
import socket
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch.multiprocessing as mp

CASE_SECONDS = 240


class World:
    """``size`` spawned ranks that run module-level functions by name.

    Args:
        size: Number of ranks.
        environment: Variables that they have beside those of this process.
    """

    def __init__(self, size: int, environment: Mapping[str, str] | None = None) -> None:
        self.size = size
        context = mp.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs))
            with mock.patch.dict(os.environ, environment or {}):
                process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: str, **kwargs: Any) -> list[Any]:
        """Call ``module:function`` with ``kwargs`` on every rank; results in rank order."""
        for connection in self._connections:
            connection.send((function, kwargs))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(CASE_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.size} did not finish {function}")
            answers.append(connection.recv())
        failures = [answer for ok, answer in answers if not ok]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    @property
    def alive(self) -> bool:
        """Whether every rank can take another case."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def set_fp16_support(supported: bool) -> None:
    """What the accelerator says of itself in this process; torch emulates fp16 on any CPU."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: supported


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from vembed_ds.distributed import comm

    torch.set_num_threads(1)
    comm.init_distributed(device_type="cpu", timeout_minutes=5)
    while True:
        try:
            function, kwargs = connection.recv()
        except EOFError:
            return
        module, _, name = function.partition(":")
        try:
            connection.send((True, getattr(importlib.import_module(module), name)(**kwargs)))
        except BaseException:  # noqa: BLE001 (whatever it is, the test process reports it)
            connection.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        # DeepSpeed keeps its engines for ever, and looks through all objects whenever it makes one:
        # after 1,500 cases that took 14 times as long as the rest of a case. So forget them.
        gc.collect()
        gc.freeze()
