"""A world of this machine's own ranks, started to be looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from vembed_ds.launching.target import free_port
from vembed_ds.preflight.findings import FAIL, Finding

SECONDS = 180


def ranks_findings(
    command: Sequence[str], *, size: int, environment: Mapping[str, str] | None = None
) -> list[Finding]:
    """What ``size`` ranks on this machine find, or that they failed.

    Args:
        command: Behind ``python``; rank 0 prints its findings as JSON.
        size: Ranks.
        environment: Variables beside those of this process.
    """
    port = free_port(None)
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **(environment or {}), **_rank(number, size, port)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(size)
    ]
    try:
        ends = [process.communicate(timeout=SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        return [
            Finding("ranks", f"{size} on this machine gave no answer in {SECONDS} s", FAIL, _REMEDY)
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    lines = [line for line in ends[0][0].splitlines() if line.startswith("[")]
    if lines:
        return [Finding(*values) for values in json.loads(lines[-1])]
    number = next((number for number, process in enumerate(processes) if process.returncode), 0)
    said = ends[number][1].strip().splitlines() or [f"exit code {processes[number].returncode}"]
    return [Finding("ranks", f"rank {number} of {size} failed: {said[-1]}", FAIL, _REMEDY)]


_REMEDY = "mend what it says; `python -c 'import torch, deepspeed'` may say more"


def _rank(number: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(size),
        "LOCAL_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
