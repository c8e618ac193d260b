"""W3: texts of log-normal lengths up to 48 tokens: how much of the work is padding."""

from __future__ import annotations

from benchmarks.comparing import MEMORY, TIME, compare
from benchmarks.options import Options, Result, Workload
from benchmarks.ours_variants import LEAN, cached, ours
from benchmarks.peers.job import Variant
from benchmarks.task import Task
from benchmarks.workloads.one_process import PLAIN, ST

BASE = "sentence-transformers, cached"
TOKENS = 768  # of a chunk: half of what 32 of the longest take
PADDING = {"padded/real": ("padding", "{:.2f}")}
VARIANTS = [
    Variant(BASE, "st", ST, {"cached": True}),
    Variant(
        "sentence-transformers, cached, 768 tokens", "st", ST, {"cached": True, "tokens": TOKENS}
    ),
    Variant("plain torch", "plain", PLAIN),
    Variant("luyug/GradCache", "gradcache", "benchmarks.peers.gradcache:luyug", code="gradcache"),
    # As the peers, all but a chunk computed twice: what is gained is padding.
    ours("cached, unsorted", cached(**LEAN, gradient_cache_sort=False)),
    ours("cached", cached(**LEAN)),
    ours("cached, 768 tokens", cached(**LEAN, gradient_cache_chunk_tokens=TOKENS)),
    ours("cached, as it comes", cached()),
]


def run(options: Options) -> Result:
    task = Task(length=48, sigma=0.8)
    return compare(task, VARIANTS, options, base=BASE, columns=TIME | PADDING | MEMORY)


WORKLOAD = Workload("mixed lengths", run, ("padding", "ratio"))
