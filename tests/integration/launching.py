"""Commands as a user types them, in a process group that ends with the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = Path(sys.executable).parent  # where `deepspeed` and `python` of this environment are


def free_port() -> int:
    """A port for the launcher, whose default may be taken by another world."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_command(
    command: Sequence[str], *, seconds: float, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run in ``folder``; the test fails with what was printed when it takes ``seconds``."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # The launcher alone would leave its ranks behind.
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"still running after {seconds} s: {command}\n{stdout}\n{stderr[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
