"""A rank without a model: it exchanges numbers with the others until something happens to it.

``python -m tests.faults.ranks STEPS MINUTES [RANK FAULT]``: does the steps, waits at most so many
minutes for other ranks; the fault happens to the rank in step 3.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

from vembed_ds import command
from vembed_ds.command import Prepared, run_on_ranks
from vembed_ds.errors import DataError


def run_out_of_memory() -> None:
    """As Python says it."""
    raise MemoryError("cannot allocate memory")


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1000),
    "hold Python's lock": lambda: ctypes.PyDLL(None).sleep(1000),
    "exit": lambda: os._exit(0),
    "finish": lambda: True,
    "memory": run_out_of_memory,
}


def happen(fault: str) -> bool:
    """Whether the rank shall finish early."""
    if fault == "error":
        raise DataError("data.jsonl, record 7: not a record")
    if fault == "bug":
        raise IndexError("list index out of range")
    return FAULTS[fault]() is True


def join(timeout_minutes: float) -> None:
    """As the command does, without the seconds that DeepSpeed takes to be imported."""
    from vembed_ds.distributed import comm

    comm.init_distributed(device_type="cpu", timeout_minutes=timeout_minutes)


def work(steps: int, victim: int, fault: str) -> None:
    from vembed_ds.distributed import comm, phases
    from vembed_ds.distributed.phases import Kind, phase

    for step in range(1, steps + 1):
        phases.set_place(f"step {step}")
        with phase(Kind.DATA):
            time.sleep(0.05)
            if step == 3:
                sys.stdout.write("step 3\n")  # the test counts from here
                sys.stdout.flush()
                if comm.rank() == victim and happen(fault):
                    return
        comm.all_max([step])


def main() -> int:
    steps, minutes = int(sys.argv[1]), float(sys.argv[2])
    victim, fault = (int(sys.argv[3]), sys.argv[4]) if len(sys.argv) > 3 else (-1, "")
    command._start = join
    return run_on_ranks(lambda: Prepared(minutes, lambda: work(steps, victim, fault)))


if __name__ == "__main__":
    raise SystemExit(main())
