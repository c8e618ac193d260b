"""This project, as a user has it: a configuration, and the training loop that it leads to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.meter import Meter
from benchmarks.peers.job import Job
from vembed_ds.checkpointing.saver import SavePolicy, Saver
from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import Config
from vembed_ds.data.collators import Batch, collate
from vembed_ds.distributed import comm
from vembed_ds.engine.ds_config import load_ds_config
from vembed_ds.engine.extensions import prepare_extensions
from vembed_ds.training.data_setup import RunData, dataset_entries, setup_data
from vembed_ds.training.engine_setup import fill_ds_config, prepare_model, read_model, start_engine
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.loss_setup import loss_configs
from vembed_ds.training.model_setup import model_spec
from vembed_ds.training.plan import plan_intervals
from vembed_ds.training.resuming import EARLIER, SETTINGS
from vembed_ds.training.run import build_loop
from vembed_ds.training.self_test import examine
from vembed_ds.training.teachers import join_student, load_teachers, prepare_teachers

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


class Built(NamedTuple):
    """A run before its first step.

    Attributes:
        loop: Its loop.
        data: Its data.
        preparation: What preparing the teachers cost.
    """

    loop: TrainingLoop
    data: RunData
    preparation: dict[str, float]


def train(job: Job, meter: Meter) -> None:
    """Options: ``stage`` of ZeRO (0), ``keys`` of the configuration."""
    config = configure(job, steps=meter.steps)
    built = build(config, stage=job.options.get("stage", 0))
    examine(built.loop, built.data, config.training, precision=config.model.precision)
    first = comm.rank() * job.task.pairs_per_rank
    rows = range(first, first + job.task.pairs_per_rank)
    batch = collate([built.data.train[row] for row in rows])
    meter.watch(built.loop.model)
    heard = _Metrics()
    built.loop.tracker = heard
    built.loop.loader = _Metered(batch, meter)
    with suppress(_MeasuredError):
        built.loop.train()
    for metrics in heard.lines:
        meter.tell(metrics["train/loss"], metrics["train/grad_norm"])


class _MeasuredError(Exception):
    """All steps are taken; what a run does at its end is not measured."""


class _Metered:
    """Gives the same batch again and again: a step is from one to the next."""

    def __init__(self, batch: Batch, meter: Meter) -> None:
        self._batch, self._meter = batch, meter

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._meter.steps):
            with self._meter.step():
                yield self._batch
        raise _MeasuredError


class _Metrics:
    """In the place of the trackers."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        self.lines.append(dict(metrics))

    def close(self) -> None:
        """Nothing to do."""


def configure(job: Job, *, steps: int) -> Config:
    """A job's configuration, as a run would have it."""
    task = job.task
    return parse_config(
        {
            "model_name": str(job.model),
            **({"pooling_method": "mean"} if task.kind == "text" else {}),
            "data_path": str(job.folder / "pairs.jsonl"),
            "image_root": str(job.folder),
            "retrieval_mode": "t2t" if task.kind == "text" else "t2i",
            "num_workers": 0,
            "batch_size": task.pairs_per_rank,
            "gradient_cache_chunk_size": task.chunk,
            "precision": "bf16" if job.setting.bf16 else "fp32",
            "temperature": task.temperature,
            "loss_bidirectional": job.symmetric,
            "freeze_text_encoder": job.frozen_text,
            "lr": task.lr,
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "scheduler_type": "constant",
            "max_steps": steps + 1,  # the end of a run is not measured
            # The first step and, without a wait for a device, hardly another.
            "logging_steps": 1 if job.setting.device == "cpu" or not job.timed else steps + 1,
            "gradient_self_test": False,  # before the first step
            "report_to": "none",
            "output_dir": str(job.scratch),
            **job.options.get("keys", {}),
        }
    )


def build(config: Config, *, stage: int) -> Built:
    """As ``vembed_ds.training.run.train`` builds it. Collective."""
    file = DS_CONFIGS / f"zero{stage}.json"
    ds_config = fill_ds_config(config, load_ds_config(file), origin=file.name, origins={})
    losses = loss_configs(config.loss, dataset_entries(config.data))
    spec = model_spec(config.model, layers=losses[0].mrl_layers or ())
    data = setup_data(config, spec)
    intervals = plan_intervals(config, per_epoch=data.steps_per_epoch)
    prepare_extensions(ds_config)
    folder = Path(config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_teachers(config, data)
    started = time.process_time()
    teachers = prepare_teachers(
        loaded, config, data, step=0, steps_per_epoch=intervals.steps_per_epoch
    )
    preparation = {
        "preparation_seconds": time.process_time() - started,
        "preparation_forwards": sum(found.teacher.forwards for found in loaded),
        "cache_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
    }
    model = read_model(config, spec, data, zero_stage=stage)
    width = prepare_model(config, model, data, folder)
    join_student(teachers, model, config, width=width, mrl_dims=())
    engine = start_engine(config, model, ds_config, intervals)
    loop = build_loop(
        config,
        model,
        engine,
        data,
        intervals,
        Saver(engine.engine, output_dir=folder, policy=SavePolicy()),
        {SETTINGS: {}, EARLIER: ()},  # for the checkpoint of a rank that is told to stop
        tracker=None,
        resumption=None,
        attach=lambda batch: batch,
        teachers=teachers,
    )
    model.train()
    return Built(loop, data, preparation)
