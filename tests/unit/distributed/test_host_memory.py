"""The host's free memory: of the machine, and of the groups that a container or Slurm sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_ds.distributed.host_memory import free_host_bytes

MB = 1 << 20
V1 = "9:name=systemd:/a\n4:memory,hugetlb:/slurm/job\n0::/"
V2 = "0::/slurm/job"


def system(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


MACHINE = {"proc/meminfo": "MemTotal:  900 kB\nMemAvailable:    102400 kB"}
V1_FILES = {
    "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
    "sys/fs/cgroup/memory/memory.usage_in_bytes": 5,
    "sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes": 80 * MB,
    "sys/fs/cgroup/memory/slurm/job/memory.usage_in_bytes": 50 * MB,
    "sys/fs/cgroup/memory/slurm/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * MB}",
}
V2_FILES = {
    "sys/fs/cgroup/slurm/job/memory.max": "max",
    "sys/fs/cgroup/slurm/job/memory.current": 50 * MB,
    "sys/fs/cgroup/slurm/memory.max": 60 * MB,
    "sys/fs/cgroup/slurm/memory.current": 55 * MB,
    "sys/fs/cgroup/slurm/memory.stat": f"anon 7\ninactive_file {3 * MB}",
}
CONTAINER = {"sys/fs/cgroup/memory.max": 40 * MB, "sys/fs/cgroup/memory.current": 10 * MB}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MACHINE, 100 * MB),
        ({**MACHINE, "proc/self/cgroup": V2}, 100 * MB),
        ({**MACHINE, "proc/self/cgroup": V2, **V2_FILES}, 8 * MB),
        ({**MACHINE, "proc/self/cgroup": V2, **CONTAINER}, 30 * MB),
        ({"proc/self/cgroup": V2, **V2_FILES}, 8 * MB),
        (
            {
                **MACHINE,
                "proc/self/cgroup": "0::/x",
                "sys/fs/cgroup/x/memory.max": 5,
                "sys/fs/cgroup/x/memory.current": 9,
            },
            0,
        ),
    ],
)
def test_the_least_counts(tmp_path: Path, files: dict[str, object], expected: int | None) -> None:
    assert free_host_bytes(system(tmp_path, files)) == expected


def test_the_first_version_of_groups(tmp_path: Path) -> None:
    root = system(tmp_path, {**MACHINE, "proc/self/cgroup": V1, **V1_FILES})
    assert free_host_bytes(root) == 32 * MB
