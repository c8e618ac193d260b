"""W2: the same on two ranks: what goes over the wire, and CPU time, at every ZeRO stage."""

from __future__ import annotations

from benchmarks.comparing import MEMORY, TIME, TRAFFIC, compare
from benchmarks.options import Options, Result, Workload
from benchmarks.ours_variants import LEAN, SLICED, cached, ours
from benchmarks.peers.job import Variant
from benchmarks.task import Task

TORCH = "benchmarks.peers.data_parallel"
ENGINE = "benchmarks.peers.deepspeed_plain:train"
LUYUG = "benchmarks.peers.gradcache:luyug"
VEMBED = "benchmarks.peers.gradcache:vembed"
TRAINER = "benchmarks.peers.sentence_transformers_trainer:train"
BASE = "DDP"
TASK = Task(ranks=2)
LAST = {"ddp": True, "reduce_last": True}
VARIANTS = [
    Variant(BASE, "ddp", f"{TORCH}:ddp"),
    Variant("DDP, luyug/GradCache", "gradcache", LUYUG, LAST, code="gradcache"),
    Variant("DDP, vembed-factory's", "vembed_factory", VEMBED, LAST, code="vembed_factory"),
    Variant("ZeRO-2, luyug/GradCache", "gradcache", LUYUG, {"stage": 2}, code="gradcache"),
    Variant("FSDP2, cached", "fsdp2", f"{TORCH}:fsdp2"),
    Variant("FSDP2, cached, two flags", "fsdp2", f"{TORCH}:fsdp2", {"gather_once": True}),
    *(
        Variant(f"ZeRO-{stage}, a backward pass per chunk", "deepspeed", ENGINE, {"stage": stage})
        for stage in (1, 2, 3)
    ),
    Variant("sentence-transformers, cached, DDP", "st", TRAINER, {"cached": True}),
    *(
        Variant(
            f"sentence-transformers, cached, ZeRO-{stage}",
            "st",
            TRAINER,
            {"cached": True, "stage": stage},
        )
        for stage in (1, 2, 3)
    ),
    *(ours(f"ZeRO-{stage}", cached(**LEAN), stage=stage) for stage in range(4)),
    ours("ZeRO-3, gathered per chunk", cached(**LEAN, zero3_gather="cache_pass"), stage=3),
    ours("ZeRO-3, gathered per module", cached(**LEAN, zero3_gather="per_module"), stage=3),
    ours("ZeRO-3, layers in slices", {**SLICED, "zero3_gather": "per_module"}, stage=3),
    ours("ZeRO-2, reduced per chunk", cached(**LEAN, gradient_reduction="per_chunk"), stage=2),
    ours("ZeRO-2, half kept", cached(gradient_cache_kept_graphs=4), stage=2),
    ours("ZeRO-2, as it comes", cached(), stage=2),
]


def run(options: Options) -> Result:
    return compare(TASK, VARIANTS, options, base=BASE, columns=TIME | TRAFFIC | MEMORY)


WORKLOAD = Workload("two ranks", run, ("counted_mb", "ratio"))
