"""W10: one rank against two at every ZeRO stage, and bytes against what the cost model says."""

from __future__ import annotations

from benchmarks.comparing import TIME, TRAFFIC, compare
from benchmarks.costs import step_bytes
from benchmarks.options import Options, Result, Workload
from benchmarks.ours_variants import LEAN, cached, ours
from benchmarks.task import Task

PREDICTED = {"predicted MB": ("predicted_mb", "{:.1f}")}
BASE = "ours, ZeRO-0, 1 rank"
MODES = [
    *(("", {}, stage) for stage in range(3)),
    *(
        (f", gathered {mode}", {"zero3_gather": mode}, 3)
        for mode in ("once", "cache_pass", "per_module")
    ),
    *((", reduced per chunk", {"gradient_reduction": "per_chunk"}, stage) for stage in (2, 3)),
]
VARIANTS = [
    ours(
        f"ZeRO-{stage}{name}, {ranks} rank{'s' * (ranks > 1)}",
        cached(**LEAN, **keys),
        stage=stage,
        ranks=ranks,
    )
    for name, keys, stage in MODES
    for ranks in (1, 2)
    if ranks > 1 or not keys
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
