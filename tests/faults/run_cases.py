"""Runs in which something breaks at a chosen place, as a rank of a test world does them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from tests.distributed.train_cases import run_train
from vembed_ds.distributed import phases
from vembed_ds.distributed.phases import Kind
from vembed_ds.errors import ConfigError

# Where a function is looked up, by the phase in which it runs.
PLACES = {
    Kind.LOADING: "vembed_ds.training.engine_setup.setup_model",
    Kind.BUILDING: "vembed_ds.training.engine_setup.initialize_engine",
    Kind.EMBEDDING: "vembed_ds.engine.train_engine.TrainEngine.embed",
    Kind.LOSS: "vembed_ds.training.loop.loss_inputs",
    Kind.REPLAY: "vembed_ds.engine.train_engine.TrainEngine.backward",
    Kind.REDUCTION: "deepspeed.runtime.engine.DeepSpeedEngine._flush_coalesced_reduction_zero12",
    Kind.OPTIMIZER: "deepspeed.runtime.engine.DeepSpeedEngine.step",
    Kind.EVALUATION: "vembed_ds.evaluation.measuring.relevant_ranks",
    Kind.SAVING: "vembed_ds.checkpointing.saving.save_engine",
}


def run_out(*, kind: str, config: str, ds_config: str) -> str:
    """The error of a run whose memory ends in a phase of this kind."""

    def fail(*args: Any, **kwargs: Any) -> None:
        assert kind in phases.current().kinds, phases.current()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with mock.patch(PLACES[Kind(kind)], fail):
        return str(run_train(config=config, ds_config=ds_config)["error"])


def run_without_model(*, config: str, ds_config: str, resume: str | None = None) -> str:
    """The error of a run that goes as far as the model."""
    missing = ConfigError("the model is loaded here")
    with mock.patch(PLACES[Kind.LOADING], mock.Mock(side_effect=missing)):
        return str(run_train(config=config, ds_config=ds_config, resume=resume)["error"])


def group_timeouts() -> tuple[float, float]:
    """Of the first group, and of the one that DeepSpeed made for itself, in seconds."""
    import torch.distributed as dist  # noqa: TID251
    from deepspeed.utils import groups

    from vembed_ds.engine.communication import join_deepspeed

    join_deepspeed()
    found = []
    for group in (dist.group.WORLD, groups._clone_world_group()):
        backend = group._get_backend(torch.device("cpu"))
        found.append(backend.options._timeout.total_seconds())
    return found[0], found[1]
