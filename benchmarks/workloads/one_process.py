"""W1: one process, a BERT of 14 million parameters, 256 pairs of 16 tokens, chunks of 32 (and 128)."""

from __future__ import annotations

from benchmarks.comparing import MEMORY, TIME, compare
from benchmarks.options import Options, Result, Workload
from benchmarks.ours_variants import LEAN, STANDARD, cached, ours
from benchmarks.peers.job import Variant
from benchmarks.task import Task

PLAIN, ST = "benchmarks.peers.plain:train", "benchmarks.peers.sentence_transformers_loss:train"
LUYUG = "benchmarks.peers.gradcache:luyug"
BASE = "plain torch"
VARIANTS = [
    Variant(BASE, "plain", PLAIN),
    Variant("plain torch, checkpointing", "plain", PLAIN, {"checkpointing": True}),
    Variant("luyug/GradCache", "gradcache", LUYUG, code="gradcache"),
    Variant("luyug/GradCache, chunks of 128", "gradcache", LUYUG, {"chunk": 128}, "gradcache"),
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
        symmetric=True,
    ),
    Variant("sentence-transformers", "st", ST),
    Variant("sentence-transformers, cached", "st", ST, {"cached": True}),
    ours("standard step", STANDARD),
    ours("cached", cached(**LEAN)),
    # Of 16 chunks.
    ours("cached, a quarter kept", cached(gradient_cache_kept_graphs=4)),
    ours("cached, half kept", cached(gradient_cache_kept_graphs=8)),
    # Of 4: fewer backward passes, each of which adds to the gradients of all weights.
    ours(
        "cached, chunks of 128, half kept",
        cached(gradient_cache_chunk_size=128, gradient_cache_kept_graphs=2),
    ),
    ours("cached, as it comes", cached()),
]


def run(options: Options) -> Result:
    return compare(Task(), VARIANTS, options, base=BASE, columns=TIME | MEMORY)


WORKLOAD = Workload("one process", run, ("peak_mb", "ratio"))
