"""W10: one rank against two at every ZeRO stage, and bytes against what the cost model says."""

from __future__ import annotations

from benchmarks.comparing import TIME, TRAFFIC, compare
from benchmarks.costs import step_bytes
from benchmarks.options import Options, Result, Workload
from benchmarks.ours_variants import cached, ours
from benchmarks.task import Task

PREDICTED = {"predicted MB": ("predicted_mb", "{:.1f}")}
BASE = "ours, ZeRO-0, 1 rank"
VARIANTS = [
    ours(f"ZeRO-{stage}, {ranks} rank{'s' * (ranks > 1)}", cached(), stage=stage, ranks=ranks)
    for stage in range(4)
    for ranks in (1, 2)
]


def run(options: Options) -> Result:
    return compare(
        Task(),
        VARIANTS,
        options,
        base=BASE,
        columns=TIME | PREDICTED | TRAFFIC,
        predict=step_bytes,
    )


WORKLOAD = Workload("one rank against two", run, ("predicted_mb", "counted_mb"))
