"""From a model to a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
from torch import nn

from vembed_ds.engine.schedules import SchedulerFactory
from vembed_ds.engine.train_engine import TrainEngine


def initialize_engine(
    model: nn.Module,
    *,
    ds_config: dict[str, Any],
    param_groups: Sequence[dict[str, Any]],
    schedule: SchedulerFactory | None = None,
) -> TrainEngine:
    """Wrap ``model`` by :func:`deepspeed.initialize`. Collective, after ``init_distributed``.

    Args:
        model: Same weights on every rank (rank 0's are broadcast), float32, no 0-dim parameter.
        ds_config: Resolved config without ``"auto"``; its optimizer is used.
        param_groups: From :func:`build_param_groups`.
        schedule: Learning-rate schedule; ``None``: constant.

    Raises:
        ValueError: A 0-dim parameter, which DeepSpeed cannot broadcast.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(f"parameter {name} is 0-dim; hold it as shape [1] (lift_scalars)")
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(param_groups),
        config=ds_config,
        lr_scheduler=schedule,
    )
    return TrainEngine(engine)
