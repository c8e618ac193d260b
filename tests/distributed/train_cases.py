"""What a rank of a test world runs of the training package."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from torch.nn import functional

from tests.worlds import set_fp16_support
from vembed_ds.config.loading import load_config, setting_origins
from vembed_ds.data.batches import StepPlan
from vembed_ds.data.collators import Batch
from vembed_ds.engine.ds_config import load_ds_config
from vembed_ds.errors import VembedError
from vembed_ds.models.encoder import TowerEncoder, TowersEncoder, TwoTowerEncoder
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.run import train


def use_torch_linear() -> None:
    """Undo what an engine at ZeRO-3 left in this process: its linear function rounds otherwise."""
    own = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", functional.linear)
    functional.linear = own


def run_train(
    *,
    config: str | None,
    ds_config: str,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    fp16_supported: bool | None = None,
    allow_change: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """As the command does: the last metrics, or the error that this rank would print.

    An error comes with the seconds that it took.

    ``fp16_supported`` is what the accelerator says of itself; ``None``: what this machine can.
    """
    if fp16_supported is not None:
        set_fp16_support(fp16_supported)
    path = None if config is None else Path(config)
    started = time.monotonic()
    try:
        loaded = load_config(path, overrides)
        origins = setting_origins(path, overrides)
        raw = load_ds_config(Path(ds_config))
        metrics = train(
            loaded,
            raw,
            ds_origin=ds_config,
            resume=resume,
            origins=origins,
            allow_change=allow_change,
            dry_run=dry_run,
        )
    except VembedError as error:
        seconds = time.monotonic() - started
        return {"error": f"{type(error).__name__}: {error}", "seconds": seconds}
    return {"metrics": metrics}


def run_dry(**options: Any) -> dict[str, Any]:
    """:func:`run_train` as a dry run, with what was said."""
    with listening("vembed_ds.training.run") as said:
        return {**run_train(**options, dry_run=True), "said": said.getvalue()}


@contextmanager
def listening(name: str) -> Iterator[io.StringIO]:
    """What a logger says inside, from notices up."""
    said = io.StringIO()
    logger, handler = logging.getLogger(name), logging.StreamHandler(said)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def run_counted(*, part: str, **options: Any) -> dict[str, Any]:
    """:func:`run_train`, and how often a tower's backbone was run for its pooled output."""
    forwards = 0
    real = {kind: kind.features for kind in (TowersEncoder, TwoTowerEncoder)}
    tower = TowerEncoder.features

    def of_encoder(self: Any, kind: str, inputs: Any) -> Any:
        nonlocal forwards
        forwards += isinstance(self, TwoTowerEncoder) and kind == part
        return real[type(self)](self, kind, inputs)

    def of_tower(self: Any, inputs: Any) -> Any:
        nonlocal forwards
        forwards += ("pixel_values" in inputs) == (part == "image")
        return tower(self, inputs)

    with (
        mock.patch.object(TowersEncoder, "features", of_encoder),
        mock.patch.object(TwoTowerEncoder, "features", of_encoder),
        mock.patch.object(TowerEncoder, "features", of_tower),
    ):
        return run_train(**options) | {"forwards": forwards}


def run_planned(**arguments: Any) -> dict[str, Any]:
    """As :func:`run_train`; and of every step how many items of each stream this rank embeds."""
    planned: list[dict[str, int]] = []
    plan = TrainingLoop.plan

    def noted(loop: TrainingLoop, batch: Batch) -> StepPlan:
        found = plan(loop, batch)
        planned.append({stream: len(items) for stream, items in found.streams.items() if items})
        return found

    with mock.patch.object(TrainingLoop, "plan", noted):
        return {**run_train(**arguments), "planned": planned}
