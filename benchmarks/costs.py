"""What a step of ours sends by the project's own cost model, from the sizes of a task alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from benchmarks.models import bert
from benchmarks.peers.encoder import PlainEncoder
from benchmarks.peers.job import Variant
from benchmarks.task import Task
from vembed_ds.engine.traffic_model import predict_embedding_bytes, predict_step_bytes

PERSISTENT = 100_000  # DeepSpeed's default: smaller parameters are whole on every rank
GLOO = 2  # its reduce-scatter is an all-reduce


def step_bytes(variant: Variant, task: Task) -> float:
    """Bytes that all ranks together send in a step of a text task over gloo.

    Args:
        variant: One of ours, with a number of kept graphs and a way of gathering.
        task: On the ranks of the variant.
    """
    keys = variant.options["keys"]
    with torch.device("meta"):
        parameters = list(PlainEncoder(bert(task.shape)).parameters())
    one_rank = predict_step_bytes(
        world_size=task.ranks,
        zero_stage=variant.options["stage"],
        parameters=_elements(parameters),
        trained=_elements(p for p in parameters if p.requires_grad),
        element_size=4,
        num_chunks=-(-2 * task.pairs_per_rank // task.chunk),
        kept_chunks=keys["gradient_cache_kept_graphs"],
        zero3_gather=keys.get("zero3_gather", "once"),
        gradient_reduction=keys.get("gradient_reduction", "once"),
        persistent=_elements(p for p in parameters if p.numel() <= PERSISTENT),
        scatter_units=GLOO,
    ).total
    vectors = predict_embedding_bytes(
        world_size=task.ranks, rows=task.pairs, width=task.width, scatter_units=GLOO
    )
    return task.ranks * (one_rank + vectors)


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
