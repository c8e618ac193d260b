"""W6: a share rho of the texts of each role stands in the batch more than once.

Without dropout, for with it two equal texts are not embedded alike.
"""

from __future__ import annotations

from benchmarks.comparing import TIME, compare
from benchmarks.options import Options, Result, Workload
from benchmarks.ours_variants import STANDARD, cached, ours
from benchmarks.peers.job import Variant
from benchmarks.task import Task
from benchmarks.workloads.one_process import BASE, PLAIN, ST

SHARES = (0.3, 0.6)
ROWS = {"rho": ("rho", "{:.1f}"), "encoder rows": ("rows", "{:d}")}
ONCE = {"encode_duplicates_once": True}
VARIANTS = [
    Variant(BASE, "plain", PLAIN),
    Variant("luyug/GradCache", "gradcache", "benchmarks.peers.gradcache:luyug", code="gradcache"),
    Variant("sentence-transformers, cached", "st", ST, {"cached": True}),
    ours("standard step, every item", {**STANDARD, "encode_duplicates_once": False}),
    ours("standard step", {**STANDARD, **ONCE}),
    ours("cached", cached(**ONCE)),
]


def run(options: Options) -> Result:
    found = {
        rho: compare(
            Task(repeated=rho, dropout=0.0),
            VARIANTS,
            options.within(f"rho {rho}"),
            base=BASE,
            columns=ROWS | TIME,
        )
        for rho in SHARES
    }
    rows = [{**row, "rho": rho} for rho, result in found.items() for row in result.rows]
    notes = [f"rho {rho}: {note}" for rho, result in found.items() for note in result.notes]
    first = found[SHARES[0]]
    return Result(first.columns, rows, notes, {str(r): result.raw for r, result in found.items()})


WORKLOAD = Workload("repeated texts", run, ("rows", "ratio"))
