"""Two ranks that are expected to die, started from a server that has imported everything."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import make_config, pairs

__all__ = ["make_config", "pairs"]

_LIMIT_SECONDS = 90


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Two MB in memory, or what the test's parameter says."""
    place = tmp_path / "small"
    place.mkdir()
    command = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size={getattr(request, 'param', '2m')}",
        "tmpfs",
        str(place),
    ]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def doomed_ranks() -> Callable[..., list[int | None]]:
    """``doomed_ranks("module:function", **kwargs)``: the exit codes of two ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "tests.faults.checkpoint_cases"])

    def run(function: str, **kwargs: Any) -> list[int | None]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks: list[BaseProcess] = [
            context.Process(target=_run_rank, args=(rank, port, function, kwargs))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(_LIMIT_SECONDS)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        assert None not in codes, f"still running: {codes}"
        return codes

    return run


def _run_rank(rank: int, port: int, function: str, kwargs: dict[str, Any]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from vembed_ds.distributed import comm

    torch.set_num_threads(1)
    comm.init_distributed(device_type="cpu", timeout_minutes=1)
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(**kwargs)
