"""How much memory the host has left for this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of the host's memory that may still be taken; ``None``: the system does not say.

    The least of what the machine has available and of what the control groups of this process
    leave, which containers and Slurm set.

    Args:
        root: Where ``proc`` and ``sys`` lie.
    """
    found = [*_available(root), *_left_by_groups(root)]
    return max(0, min(found)) if found else None


def _available(root: Path) -> Iterator[int]:
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"))
    if found:
        yield int(found[1]) * 1024


def _left_by_groups(root: Path) -> Iterator[int]:
    """What the limits of all groups around this process leave, of either version."""
    lines = filter(None, _read(root / "proc/self/cgroup").splitlines())
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            mounted, limit, used = "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mounted, limit, used = (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        # In a container the process's own group may be mounted where the tree would begin.
        names = Path(path.strip("/"))
        for group in (names, *names.parents):
            yield from _left_by(root / mounted / group, limit, used)


def _left_by(group: Path, limit: str, used: str) -> Iterator[int]:
    most, taken = _read(group / limit).strip(), _read(group / used).strip()
    if not most.isdigit() or not taken.isdigit():  # "max", or no such file
        return
    # Pages of files that nobody uses are counted, and go as soon as memory is wanted.
    counts = dict(line.split() for line in _read(group / "memory.stat").splitlines() if line)
    idle = counts.get("total_inactive_file", counts.get("inactive_file", 0))
    yield int(most) - int(taken) + int(idle)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
