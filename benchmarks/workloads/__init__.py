"""What can be compared, by number."""

from __future__ import annotations

from benchmarks.options import Workload
from benchmarks.workloads import (
    checkpoints,
    clip,
    duplicates,
    gpu,
    lengths,
    loss_memory,
    one_process,
    scaling,
    teachers,
    two_ranks,
)

WORKLOADS: dict[str, Workload] = {
    "W1": one_process.WORKLOAD,
    "W2": two_ranks.WORKLOAD,
    "W3": lengths.WORKLOAD,
    "W4": clip.WORKLOAD,
    "W5": loss_memory.WORKLOAD,
    "W6": duplicates.WORKLOAD,
    "W7": teachers.WORKLOAD,
    "W8": gpu.WORKLOAD,
    "W9": checkpoints.WORKLOAD,
    "W10": scaling.WORKLOAD,
}
