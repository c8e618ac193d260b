"""W4: a small CLIP (two towers of 4 layers, 192 wide, pictures of 64 pixels), 256 pairs."""

from __future__ import annotations

from benchmarks.comparing import MEMORY, TIME, compare
from benchmarks.options import Options, Result, Workload
from benchmarks.ours_variants import LEAN, STANDARD, cached, ours
from benchmarks.peers.job import Variant
from benchmarks.task import Task
from benchmarks.workloads.one_process import BASE, PLAIN

VARIANTS = [
    Variant(BASE, "plain", PLAIN),
    Variant("plain torch, checkpointing", "plain", PLAIN, {"checkpointing": True}),
    Variant("luyug/GradCache", "gradcache", "benchmarks.peers.gradcache:luyug", code="gradcache"),
    Variant(
        "vembed-factory's GradCache",
        "vembed_factory",
        "benchmarks.peers.gradcache:vembed",
        code="vembed_factory",
    ),
    Variant(
        "open_clip, accum-freq 8",
        "open_clip",
        "benchmarks.peers.open_clip:train",
        code="open_clip_loss",
    ),
    ours("standard step", STANDARD),
    ours("cached", cached(**LEAN)),
    # Of 8 chunks, of a text and a picture each.
    ours("cached, half kept", cached(gradient_cache_kept_graphs=4)),
    ours("cached, as it comes", cached()),
    Variant("plain torch, texts frozen", "plain", PLAIN, frozen_text=True),
    ours("cached, texts frozen", cached(), frozen_text=True),
]


def run(options: Options) -> Result:
    task = Task(kind="clip", layers=4, width=192, symmetric=True)
    return compare(task, VARIANTS, options, base=BASE, columns=TIME | MEMORY)


WORKLOAD = Workload("a small CLIP", run, ("peak_mb", "ratio"))
