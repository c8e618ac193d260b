"""Optimizer, schedule and tracker for a script of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from vembed_ds.config.schema import Config
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.engine.schedules import build_schedule
from vembed_ds.errors import ConfigError
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.rates import set_rates
from vembed_ds.tracker_names import tracker_names
from vembed_ds.training.config import as_config
from vembed_ds.training.model_setup import own_rates


def build_optimizer(model: EmbeddingModel, config: Config | Mapping[str, Any]) -> torch.optim.AdamW:
    """AdamW as configured; matrices decay, norms, biases and scalars do not.

    Under DeepSpeed it is a description: :func:`prepare_engine` gives its groups to the optimizer
    that DeepSpeed makes, and which alone steps.

    Args:
        model: Its trained parameters are taken, so adapters must be in it.
        config: A configuration, or a plain mapping.

    Raises:
        ConfigError: A part of the model is given a rate and has nothing to train.
    """
    settings = as_config(config).optimizer
    set_rates(model, own_rates(settings))
    return torch.optim.AdamW(
        build_param_groups(model, weight_decay=settings.weight_decay),
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    config: Config | Mapping[str, Any],
    *,
    num_epochs: int,
    steps_per_epoch: int,
) -> tuple[LRScheduler, int]:
    """The schedule as configured, and its warm-up.

    Args:
        optimizer: From :func:`build_optimizer`.
        config: A configuration, or a plain mapping.
        num_epochs: Of the run; ``max_steps`` wins over it.
        steps_per_epoch: Optimizer steps, which are the same on every rank.

    Returns:
        The schedule, and the number of warm-up steps.

    Raises:
        ConfigError: The warm-up is as long as the run.
    """
    found = as_config(config)
    settings = found.optimizer
    num_steps = found.training.max_steps or num_epochs * steps_per_epoch
    warmup = settings.warmup_steps or math.ceil(num_steps * settings.warmup_ratio)
    if settings.scheduler_type == "constant":
        warmup = 0
    if settings.warmup_steps >= num_steps:
        raise ConfigError(
            f"warmup_steps={settings.warmup_steps}: the run has {num_steps} steps, so the learning "
            "rate would never be reached; lower warmup_steps"
        )
    schedule = build_schedule(
        settings.scheduler_type,
        num_steps=num_steps,
        warmup_steps=settings.warmup_steps,
        warmup_ratio=settings.warmup_ratio,
    )
    return schedule(optimizer), warmup


def resolve_tracker(report_to: str | None) -> tuple[str | None, dict[str, Any]]:
    """The trackers to open, by name.

    Args:
        report_to: As of :func:`vembed_ds.tracker_names.tracker_names`.

    Returns:
        The name, ``None`` for none, and arguments for :func:`build_tracker`, which also takes
        ``folder``, ``run_name`` and ``config`` and opens it, on rank 0.

    Raises:
        ConfigError: No such tracker.
    """
    name = report_to or "none"
    try:
        tracker_names(name)
    except ValueError as error:
        raise ConfigError(f"report_to={name!r}: {error}") from error
    return (None if name == "none" else name), {"report_to": name}
