"""Memory that a piece of code takes, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Not `ru_maxrss`: it survives exec, so that it begins with the size of the test process, behind
# which some hundred megabytes would hide.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = peak()
"""


def measure(imports: str, code: str, *arguments: str) -> tuple[int, str]:
    """Run ``code``, which puts a value into ``outcome``, after ``imports``.

    Returns:
        The megabytes that ``code`` took at its peak beyond the imports, and ``outcome`` as text.
    """
    program = f"import sys\n{imports}\n{PEAK}\n{code}\nprint((peak() - before) // 1024, outcome)\n"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    megabytes, _, outcome = done.stdout.strip().partition(" ")
    return int(megabytes), outcome
