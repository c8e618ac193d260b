"""What a run will do: everything that is known before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed_ds.config.schema import Config, LossConfig
from vembed_ds.data.workers import prepare_server
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.errors import ConfigError
from vembed_ds.models.builder import ModelSpec
from vembed_ds.training.compiling import refuse_compiling
from vembed_ds.training.data_setup import RunData, dataset_entries, setup_data
from vembed_ds.training.engine_setup import fill_ds_config
from vembed_ds.training.loop import Intervals
from vembed_ds.training.loss_setup import (
    check_data,
    evaluated_dims,
    loss_configs,
    weak_distillation,
)
from vembed_ds.training.model_setup import model_spec
from vembed_ds.training.resuming import Resumption, keep_global_batch, run_settings
from vembed_ds.training.stream_setup import setup_stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """A run before its model is loaded.

    Attributes:
        config: The configuration, with the batch of a rank that keeps the global one.
        configured_batch_size: What it said of that batch itself.
        ds_config: DeepSpeed's, without ``"auto"``.
        losses: Of every data set.
        spec: The model's shape.
        data: Training and validation data.
        intervals: What happens when.
        settings: From :func:`run_settings`.
    """

    config: Config
    configured_batch_size: int
    ds_config: dict[str, Any]
    losses: Sequence[LossConfig]
    spec: ModelSpec
    data: RunData
    intervals: Intervals
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.run.output_dir)

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's."""
        return int(self.ds_config["zero_optimization"]["stage"])

    @property
    def prefixes(self) -> list[int]:
        """Dimensions that any loss trains beside all."""
        return sorted({dim for loss in self.losses for dim in evaluated_dims(loss)})


def plan_run(
    config: Config,
    raw_ds_config: Mapping[str, Any],
    *,
    ds_origin: str,
    origins: Mapping[str, str],
    resumption: Resumption | None,
) -> RunPlan:
    """Read the data, and see that data and settings go together. Collective.

    Args:
        config: The validated configuration.
        raw_ds_config: DeepSpeed's, with ``"auto"`` where ``config`` decides.
        ds_origin: Where that came from, for messages.
        origins: Where the values of ``config`` came from, for messages.
        resumption: What the run goes on from.

    Raises:
        VembedError: On every rank.
    """
    configured = config.training.batch_size
    if resumption is not None:
        config = keep_global_batch(config, resumption)
    ds_config = fill_ds_config(config, raw_ds_config, origin=ds_origin, origins=origins)
    refuse_compiling(config, ds_config)
    losses = loss_configs(config.loss, dataset_entries(config.data))
    spec = model_spec(config.model, layers=losses[0].mrl_layers or ())
    with phase(Kind.OTHER, "reading the data"):
        data = setup_stream(config, spec) if config.data.streaming else setup_data(config, spec)
    check_data(losses, data.members, config.distillation)
    if notice := weak_distillation(config):
        logger.warning("%s", notice)
    if config.data.num_workers:
        prepare_server(data.train)  # imports beside what follows here
    intervals = plan_intervals(config, per_epoch=data.steps_per_epoch)
    return RunPlan(
        config,
        configured,
        ds_config,
        losses,
        spec,
        data,
        intervals,
        settings=run_settings(config, ds_config, data, intervals),
    )


def plan_intervals(config: Config, *, per_epoch: int | None) -> Intervals:
    """How many steps, and what happens when.

    Args:
        config: The configuration.
        per_epoch: Steps of one epoch; ``None``: a stream, for which max_steps is set.

    Raises:
        ConfigError: The warm-up is longer than the run.
    """
    num_steps = config.training.max_steps or config.training.epochs * (per_epoch or 0)
    run, warmup = config.run, config.optimizer.warmup_steps
    if warmup >= num_steps:
        raise ConfigError(
            f"warmup_steps={warmup}: the run has {num_steps} steps ({config.training.epochs} epochs "
            f"of {per_epoch}), so the learning rate would never be reached; lower warmup_steps"
        )
    return Intervals(
        num_steps=num_steps,
        steps_per_epoch=per_epoch,
        logging_steps=run.logging_steps,
        eval_steps=run.eval_steps,
        save_steps=run.save_steps,
        save_minutes=run.save_every_minutes,
        eval_on_start=run.eval_on_start,
        save_epochs=run.save_epochs,
    )
