"""From a model to a DeepSpeed engine."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import deepspeed
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import groups
from torch import nn

from vembed_ds.distributed import comm
from vembed_ds.engine.choices import AUTO, Gather, Reduce, choose_gather, choose_reduce
from vembed_ds.engine.communication import join_deepspeed
from vembed_ds.engine.memory import whole_bytes
from vembed_ds.engine.release import remember_engine
from vembed_ds.engine.schedules import SchedulerFactory
from vembed_ds.engine.train_engine import TrainEngine

logger = logging.getLogger(__name__)


def initialize_engine(
    model: nn.Module,
    *,
    ds_config: dict[str, Any],
    param_groups: Sequence[dict[str, Any]],
    schedule: SchedulerFactory | None = None,
    zero3_gather: str = AUTO,
    gradient_reduction: str = Reduce.ONCE,
    idle: Collection[nn.Parameter] = (),
) -> TrainEngine:
    """Wrap ``model`` by :func:`deepspeed.initialize`. Collective, after ``init_distributed``.

    Args:
        model: Same weights on every rank (rank 0's are broadcast), float32, no 0-dim parameter.
        ds_config: Resolved config without ``"auto"``; its optimizer is used.
        param_groups: From :func:`build_param_groups`.
        schedule: Learning-rate schedule; ``None``: constant.
        zero3_gather: A value of :class:`Gather`, or ``auto``.
        gradient_reduction: A value of :class:`Reduce`, or ``auto``.
        idle: Parameters that no pass of a step needs.

    Raises:
        ValueError: A 0-dim parameter, which DeepSpeed cannot broadcast.
        ConfigError: DeepSpeed cannot do what was asked for.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(f"parameter {name} is 0-dim; hold it as shape [1] (lift_scalars)")
    join_deepspeed()
    left_out = set(idle)
    need = whole_bytes(
        (p for p in model.parameters() if p not in left_out),
        element_size=2 if _is_16_bit(ds_config) else 4,
    )
    stage = ds_config["zero_optimization"]["stage"]
    reduce = choose_reduce(gradient_reduction, need, zero_stage=stage)
    if reduce is Reduce.PER_CHUNK:  # DeepSpeed adds the chunks up, in this precision
        ds_config = {**ds_config, "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(param_groups),
        config=ds_config,
        lr_scheduler=schedule,
    )
    remember_engine(engine)
    # The machines of hpZ; left behind, a teacher's engine would take them for its own.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    _undo_warm_up_step(engine.optimizer)
    if reduce is Reduce.PER_CHUNK:
        need = need._replace(gradients=0)
    gather = choose_gather(zero3_gather, engine, need)
    if gather is Gather.ONCE and engine.zero_hpz_partition_size() > 1 and comm.is_main():
        logger.warning(
            "zero_hpz_partition_size=%d takes memory and saves nothing: the parameters are gathered "
            "once per step; remove it, or set zero3_gather: cache_pass",
            engine.zero_hpz_partition_size(),
        )
    return TrainEngine(engine, gather=gather, reduce=reduce, idle=idle)


def _is_16_bit(ds_config: dict[str, Any]) -> bool:
    return any(ds_config.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16"))


def _undo_warm_up_step(optimizer: Any) -> None:
    """Take back the optimizer step that DeepSpeed makes at start-up at ZeRO-0 in 16 bit.

    Its 16-bit wrappers allocate the optimizer's state by a step with gradient zero. That counts
    in Adam's bias correction and decays the float32 weights once (seen in DeepSpeed 0.19.8: the
    second loss was 29 % off). ZeRO-1 to 3 make no such step.
    """
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        pairs = zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
        weights = [pair for masters, params in pairs for pair in zip(masters, params, strict=True)]
    elif isinstance(optimizer, FP16_Optimizer):
        weights = list(zip(optimizer.fp32_groups_flat, optimizer.fp16_groups_flat, strict=True))
    else:
        return
    optimizer.optimizer.state.clear()
    for master, parameter in weights:
        master.data.copy_(parameter.data)
        master.grad = None
