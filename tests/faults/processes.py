"""Ranks as processes of their own, which a fault may end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from tests.integration.launching import ROOT, free_port


class Ended(NamedTuple):
    """How a rank ended."""

    code: int
    stderr: str
    seconds: float  # after the first look


class Ranks:
    """Processes that believe to be ranks 0, 1, ... of a world.

    Args:
        command: What each runs, behind ``python``.
        size: Ranks of the world.
        started: Ranks that are started; all by default.
        port: Where they meet.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        size: int,
        started: Sequence[int] | None = None,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.processes = {
            rank: subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, **self._environment(rank, size)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            for rank in (range(size) if started is None else started)
        }

    def _environment(self, rank: int, size: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }

    def wait_for(self, text: str, *, rank: int, seconds: float) -> None:
        """Until the rank has written something to its standard output."""
        output = self.processes[rank].stdout
        assert output is not None
        deadline, written = time.monotonic() + seconds, b""
        while text.encode() not in written:
            ready, _, _ = select.select([output], [], [], deadline - time.monotonic())
            found = os.read(output.fileno(), 4096) if ready else b""
            if not found:
                raise TimeoutError(f"rank {rank} has not come so far: {written!r}")
            written += found

    def wait(self, ranks: Sequence[int], *, seconds: float) -> dict[int, Ended]:
        """How these ranks end, all of them within so many seconds."""
        started = time.monotonic()
        ended = {}
        for rank in ranks:
            left = seconds - (time.monotonic() - started)
            _, stderr = self.processes[rank].communicate(timeout=max(left, 0.1))
            ended[rank] = Ended(self.processes[rank].returncode, stderr, time.monotonic() - started)
        return ended

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@contextmanager
def ranks(command: Sequence[str], **how: object) -> Iterator[Ranks]:
    """:class:`Ranks` that end with the test."""
    running = Ranks(command, **how)  # type: ignore[arg-type]
    try:
        yield running
    finally:
        running.close()
