"""Learning-rate schedules: warm-up, then one of transformers' ways down."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

SchedulerFactory = Callable[[Optimizer], LRScheduler]


def build_schedule(
    scheduler_type: str, *, num_steps: int, warmup_steps: int, warmup_ratio: float
) -> SchedulerFactory:
    """A factory that DeepSpeed calls with its optimizer, and whose result it steps and saves.

    Args:
        scheduler_type: Any name of :func:`transformers.get_scheduler` that needs no more
            arguments. ``constant`` has no warm-up, ``constant_with_warmup`` has.
        num_steps: Optimizer steps of the whole run.
        warmup_steps: Steps from 0 to the full rate; 0: ``warmup_ratio`` decides.
        warmup_ratio: Share of ``num_steps``, rounded up.
    """
    warmup = warmup_steps or math.ceil(num_steps * warmup_ratio)

    def schedule(optimizer: Optimizer) -> LRScheduler:
        return get_scheduler(  # type: ignore[no-any-return]
            scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps
        )

    return schedule


def move_schedule(schedule: LRScheduler, *, last_epoch: int, step_count: int) -> None:
    """Go to a place of a schedule, as if it had been stepped there; its base rates stay.

    Args:
        schedule: From :func:`build_schedule`, in an engine.
        last_epoch: Steps of the schedule.
        step_count: How often it was told to step, the first at its making included.
    """
    assert isinstance(schedule, LambdaLR), "transformers has no other for our names"
    schedule.last_epoch, schedule._step_count = last_epoch, step_count
    factors = [factor(last_epoch) for factor in schedule.lr_lambdas]
    rates = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
