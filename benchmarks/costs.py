"""What a step of ours sends, from the sizes alone: the model that counted bytes are held against."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.models import bert
from benchmarks.peers.encoder import PlainEncoder
from benchmarks.peers.job import Variant
from benchmarks.task import Task

FLOAT, KEY = 4, 8
PERSISTENT = 100_000  # DeepSpeed's default: smaller parameters are whole on every rank
ALL_REDUCE, GATHER = 2, 1  # times (N - 1) of a tensor, of all ranks together
REDUCE_SCATTER = 2  # over gloo, which has none of its own; 1 over NCCL


def step_bytes(variant: Variant, task: Task) -> float:
    """Bytes that all ranks together send in a step of a text task over gloo.

    Args:
        variant: One of ours.
        task: On the ranks of the variant.
    """
    sizes = _sizes(task)
    stage, keys = variant.options["stage"], variant.options["keys"]
    chunks = -(-2 * task.pairs_per_rank // task.chunk)
    if stage == 0:
        parameters = ALL_REDUCE * sizes["trained"]
    elif stage < 3:
        parameters = (ALL_REDUCE + GATHER) * sizes["trained"]
    else:
        trained, frozen = gathers(keys.get("zero3_gather", "per_module"), chunks)
        gathered = trained * sizes["sharded"] + frozen * sizes["frozen"] + sizes["whole"]
        parameters = REDUCE_SCATTER * sizes["trained"] + GATHER * gathered
    vectors = (GATHER + REDUCE_SCATTER) * task.pairs * task.width
    return (task.ranks - 1) * (FLOAT * (parameters + vectors) + KEY * GATHER * task.pairs)


def gathers(mode: str, chunks: int) -> tuple[int, int]:
    """How often ZeRO-3 gathers a weight in a step, by ``zero3_gather``: trained, frozen.

    For each module call, a chunk that is embedded, replayed and differentiated gathers what is
    trained three times; the last chunk keeps its graph and is not replayed.
    """
    return {
        "per_module": (3 * chunks - 1, 2 * chunks - 1),
        "cache_pass": (chunks + 1, chunks + 1),
        "once": (1, 1),
    }[mode]


def _sizes(task: Task) -> dict[str, int]:
    """Numbers of parameters: of all that are trained, and of those at ZeRO-3 in shards or whole."""
    with torch.device("meta"):
        model = PlainEncoder(bert(task.shape))
    parameters = list(model.parameters())
    sharded = [p for p in parameters if p.numel() > PERSISTENT]

    def total(chosen: list[nn.Parameter]) -> int:
        return sum(p.numel() for p in chosen)

    return {
        "trained": total([p for p in parameters if p.requires_grad]),
        "sharded": total([p for p in sharded if p.requires_grad]),
        "frozen": total([p for p in sharded if not p.requires_grad]),
        "whole": total(parameters) - total(sharded),
    }
