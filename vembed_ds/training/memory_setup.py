"""What the configuration, and the checkpoint, say of a step's memory."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from vembed_ds.config.schema import Config, TrainingConfig
from vembed_ds.data.chunking import AUTO, ChunkBudget
from vembed_ds.distributed import comm
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import OutOfMemoryError
from vembed_ds.steps.kept_graphs import GraphBudget, KeptGraphs
from vembed_ds.steps.meters import build_meter
from vembed_ds.training.changes import ALLOW
from vembed_ds.training.engine_setup import chunk_budget
from vembed_ds.training.memory_report import report, setting
from vembed_ds.training.resuming import Resumption
from vembed_ds.training.step_memory import StepMemory

logger = logging.getLogger(__name__)

SIZE = "gradient_cache_chunk_size"
BUDGET = "chunk_budget"  # in the state of a checkpoint


def step_memory(config: Config, engine: TrainEngine) -> StepMemory:
    """What the configuration and the engine ask for."""
    offload = bool(engine.engine.zero_use_cpu_optimizer())
    known = setting(config, zero_stage=engine.zero_stage, offload=offload)

    def explain(cause: BaseException, budget: ChunkBudget, kept_graphs: int) -> OutOfMemoryError:
        return report(cause, known._replace(budget=budget, kept_graphs=kept_graphs))

    return StepMemory(
        _kept_graphs(config, engine), can_agree=engine.chunks_are_local, explain=explain
    )


def _kept_graphs(config: Config, engine: TrainEngine) -> KeptGraphs:
    number = config.training.gradient_cache_kept_graphs
    if number != AUTO:
        return KeptGraphs(number)
    # Where it would round otherwise than the steps after it, a step after a restart must not measure:
    # it keeps one graph, and on a CPU runs compiled modules uncompiled.
    uncompiled = config.training.use_torch_compile and engine.device.type == "cpu"
    if uncompiled or not engine.kept_graphs_are_free:
        return KeptGraphs(1)
    meter = build_meter(engine.device, local_ranks=comm.local_world_size())
    budget = GraphBudget(meter, reserve=lambda: engine.bytes_beside_graphs)
    # What ZeRO-3 gathers for a chunk depends on whether it is computed again.
    return KeptGraphs(budget=budget, agree=None if engine.chunks_are_local else _fewest)


def _fewest(number: int) -> int:
    """Of all ranks. Collective."""
    (negative,) = comm.all_max([-number])
    return -negative


def resumed_budget(training: TrainingConfig, resumption: Resumption | None) -> ChunkBudget:
    """How large chunks are: as configured, or smaller where the run has been short of memory.

    Chunks decide what dropout draws, so a run that goes on cuts as it did; unless other chunks are
    configured now.
    """
    configured = chunk_budget(training)
    if resumption is None or not _goes_on(training, resumption):
        return configured
    return replace(configured, **resumption.state[BUDGET])


def tell_resumed_budget(training: TrainingConfig, budget: ChunkBudget) -> None:
    """Say so where chunks are not those of the configuration.

    Args:
        training: As configured.
        budget: From :func:`resumed_budget`.
    """
    if budget == chunk_budget(training):
        return
    if training.gradient_cache_chunk_size == AUTO:
        logger.info(
            "%s: %s, as when the run began; add %s %s to choose anew",
            SIZE,
            budget.items,
            ALLOW,
            SIZE,
        )
        return
    logger.warning(
        "chunks are smaller than configured, as since memory ran out: gradient_cache_chunk_size "
        "%s, gradient_cache_chunk_tokens %s; set either to have them otherwise",
        budget.items,
        budget.tokens,
    )


def is_to_be_chosen(training: TrainingConfig, resumption: Resumption | None) -> bool:
    """Whether nobody knows yet how large chunks are: ``auto``, and the run has not begun."""
    automatic = training.use_gradient_cache and training.gradient_cache_chunk_size == AUTO
    return automatic and not (resumption is not None and _goes_on(training, resumption))


def _goes_on(training: TrainingConfig, resumption: Resumption) -> bool:
    """Whether the chunks are those of the checkpoint."""
    keys = ("use_gradient_cache", SIZE, "gradient_cache_chunk_tokens")
    same = all(resumption.settings.get(key) == getattr(training, key) for key in keys)
    chosen_anew = training.gradient_cache_chunk_size == AUTO and SIZE in resumption.allowed
    return same and not chosen_anew and BUDGET in resumption.state


def saved_budget(budget: ChunkBudget) -> dict[str, Any]:
    """What :func:`resumed_budget` needs."""
    return {"items": budget.items, "tokens": budget.tokens}
