"""Where the state of a run's model will lie, as far as configuration and machine decide it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vembed_ds.config.schema import Config
from vembed_ds.engine.choices import AUTO, Reduce, gather_that_fits, reduce_that_fits
from vembed_ds.engine.memory import WholeBytes
from vembed_ds.planning.parameters import ModelSize
from vembed_ds.planning.states import Setting


def placement(
    config: Config,
    size: ModelSize,
    ds_config: Mapping[str, Any],
    *,
    ranks: int,
    memory: int,
    accelerator: bool,
) -> Setting:
    """What decides which part of the model's state a rank holds.

    Args:
        config: Of the run.
        size: Of its model.
        ds_config: DeepSpeed's, resolved.
        ranks: Number of them.
        memory: Bytes that one has, by which ``auto`` is decided.
        accelerator: Whether it has one.
    """
    zero, optimizer = ds_config.get("zero_optimization", {}), ds_config.get("optimizer", {})
    stage, momentum = zero.get("stage", 0), optimizer.get("params", {}).get("momentum", 0)
    is_adam = optimizer.get("type", "AdamW").lower().startswith("adam")

    def on_host(name: str) -> bool:
        return (zero.get(name) or {}).get("device") == "cpu"

    found = Setting(
        ranks=ranks,
        zero_stage=stage,
        precision=config.model.precision,
        offload_optimizer=on_host("offload_optimizer"),
        offload_parameters=on_host("offload_param"),
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        buckets=2 if zero.get("overlap_comm") and stage < 3 else 1,
        persistence=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        live_limit=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
        reuse_distance=int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
        moments=2 if is_adam else int(momentum != 0),
        accelerator=accelerator,
    )
    return _as_chosen_at_start(found, config, size, memory)


def _as_chosen_at_start(setting: Setting, config: Config, size: ModelSize, memory: int) -> Setting:
    """With what the engine makes of ``auto``."""
    gather: str = config.training.zero3_gather
    reduction: str = config.training.gradient_reduction
    own = 0 if setting.precision == "fp32" else setting.width
    need = WholeBytes(
        parameters=setting.width * (size.total - sum(size.idle)), gradients=(4 + own) * size.trained
    )
    if reduction == AUTO:
        reduction = "once" if setting.zero_stage < 2 else reduce_that_fits(need, memory).value
    if gather == AUTO:
        left = need._replace(gradients=0) if reduction == Reduce.PER_CHUNK.value else need
        gather = gather_that_fits(left, memory).value
    return replace(
        setting, gather="once" if setting.zero_stage < 3 else gather, reduction=reduction
    )
