"""A whole run: check everything cheap, build everything, train."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from vembed_ds.checkpointing.export import describe_model
from vembed_ds.checkpointing.store import (
    check_resumable,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from vembed_ds.config.schema import Config
from vembed_ds.data.collators import Batch, collate
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.fingerprint import fingerprint
from vembed_ds.data.loader import build_loader
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.sampler import GlobalBatchSampler, steps_per_epoch
from vembed_ds.distributed import comm
from vembed_ds.distributed.seeding import seed_everything
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.engine.ds_config import resolve_ds_config
from vembed_ds.engine.extensions import prepare_extensions
from vembed_ds.engine.initialize import initialize_engine
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.engine.schedules import build_schedule
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.evaluation.retrieval import (
    Judgments,
    check_recall_k,
    evaluate_retrieval,
    read_judgments,
)
from vembed_ds.losses import build_loss
from vembed_ds.models.builder import ModelSpec
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.reach import mark_unreached
from vembed_ds.steps.self_test import TOLERANCES, check_gradient
from vembed_ds.tracking.trackers import Tracker, build_tracker
from vembed_ds.training.data_setup import build_dataset, check_records, open_source
from vembed_ds.training.frozen_features import cache_text_features, has_frozen_text_tower
from vembed_ds.training.model_setup import model_spec, setup_model, setup_processor
from vembed_ds.training.output import prepare_output
from vembed_ds.training.trainer import Intervals, Trainer

logger = logging.getLogger(__name__)

SELF_TEST_CANDIDATES = 16  # per rank; three of them are compared


@dataclass(frozen=True)
class RunData:
    """The data of a run, and what turns it into model inputs."""

    processor: ItemProcessor
    train: PairDataset
    fingerprint: str
    val: PairDataset | None = None
    judgments: Judgments | None = None


def train(
    config: Config, raw_ds_config: Mapping[str, Any], *, ds_origin: str, resume: str | None
) -> dict[str, float]:
    """Train as configured, from the data to the last checkpoint.

    Collective, after ``comm.init_distributed``. Everything that can be wrong is looked at
    before the model's weights are loaded.

    Args:
        config: The validated configuration.
        raw_ds_config: DeepSpeed's, with ``"auto"`` where ``config`` decides.
        ds_origin: Where that came from, for messages.
        resume: A checkpoint, a run's folder, ``"auto"``, or ``None`` for a fresh start.

    Returns:
        The last evaluation's metrics.

    Raises:
        VembedError: On every rank.
    """
    ds_config = fill_ds_config(config, raw_ds_config, origin=ds_origin)
    spec = model_spec(config.model)
    data = setup_data(config, spec)
    intervals = plan_run(config, num_records=len(data.train))
    checkpoint, step = _choose_checkpoint(config, ds_config, data, intervals, resume)
    folder = Path(config.run.output_dir)
    tracker = comm.run_together(
        lambda: _open_output(config, ds_config, resuming=checkpoint is not None, step=step),
        doing=f"output_dir={config.run.output_dir!r}",
    )
    prepare_extensions(ds_config)
    model, engine = build_engine(config, spec, ds_config, data, intervals, folder)
    if checkpoint is not None:
        load_checkpoint(engine.engine, checkpoint)
    trainer = build_trainer(
        config, model, engine, data, intervals, folder, tracker=tracker, step=step
    )
    if config.training.gradient_self_test:
        self_test(trainer, data.train, precision=config.model.precision)
    return trainer.train()


def _choose_checkpoint(
    config: Config,
    ds_config: Mapping[str, Any],
    data: RunData,
    intervals: Intervals,
    resume: str | None,
) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and its step; ``(None, 0)`` for a fresh start."""
    if resume is None:
        return None, 0
    checkpoint = comm.run_together(
        lambda: find_checkpoint(resume, Path(config.run.output_dir)), doing=f"--resume {resume}"
    )
    comm.require_equal(checkpoint and checkpoint.name, what=f"--resume {resume}")
    if checkpoint is None:
        logger.warning("--resume auto: %s has no checkpoint; starting fresh", config.run.output_dir)
        return None, 0
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    state = run_identity(config, data, intervals)
    step = check_resumable(checkpoint, zero_stage=stage, state=state)
    logger.info("resuming from %s, step %d of %d", checkpoint, step, intervals.num_steps)
    if step >= intervals.num_steps:
        logger.warning("the run is complete: nothing is left to train")
    return checkpoint, step


def run_identity(config: Config, data: RunData, intervals: Intervals) -> dict[str, Any]:
    """What decides which samples and rates come next; a resumed run must have the same."""
    return {
        "batch_size": config.training.batch_size,
        "seed": config.training.seed,
        "num_steps": intervals.num_steps,
        "num_records": len(data.train),
        "data_fingerprint": data.fingerprint,
    }


def fill_ds_config(config: Config, raw: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """DeepSpeed's config with our values in place of ``"auto"``."""
    accelerator, optimizer = get_accelerator(), config.optimizer
    return resolve_ds_config(
        raw,
        origin=origin,
        world_size=comm.world_size(),
        batch_size=config.training.batch_size,
        precision=config.model.precision,
        max_grad_norm=optimizer.max_grad_norm,
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_epsilon,
        weight_decay=optimizer.weight_decay,
        device_type=accelerator.device_name(),
        fp16_supported=bool(accelerator.is_fp16_supported()),
        bf16_supported=bool(accelerator.is_bf16_supported()),
    )


def setup_data(config: Config, spec: ModelSpec) -> RunData:
    """Processor, training and validation data, all checked. Collective."""
    train_source = open_source(config.data, key="data_path")
    val_source = open_source(config.data, key="val_data_path")
    assert train_source is not None  # data_path is required
    processor = setup_processor(config, spec, needed=train_source.reader.streams)
    train_data = build_dataset(train_source, processor=processor, config=config)
    check_records(train_data)
    comm.require_equal(len(train_data), what="number of records in data_path")
    # One rank reads the whole data for it; the others' copies are compared by length.
    digest = comm.all_gather_objects(fingerprint(train_data.table) if comm.is_main() else None)[0]
    if val_source is None:
        return RunData(processor, train_data, digest)
    val_data = build_dataset(val_source, processor=processor, config=config)
    check_records(val_data)
    judgments = read_judgments(val_data)
    check_recall_k(config.run.eval_recall_k, judgments=judgments, origin=val_source.reader.origin)
    return RunData(processor, train_data, digest, val_data, judgments)


def plan_run(config: Config, *, num_records: int) -> Intervals:
    """How many steps, and what happens when.

    Raises:
        DataError: The records do not fill one global batch.
    """
    global_batch_size = config.training.batch_size * comm.world_size()
    per_epoch = steps_per_epoch(num_records, global_batch_size)
    run = config.run
    return Intervals(
        num_steps=config.training.max_steps or config.training.epochs * per_epoch,
        steps_per_epoch=per_epoch,
        logging_steps=run.logging_steps,
        eval_steps=run.eval_steps,
        save_steps=run.save_steps,
        eval_on_start=run.eval_on_start,
    )


def build_engine(
    config: Config,
    spec: ModelSpec,
    ds_config: dict[str, Any],
    data: RunData,
    intervals: Intervals,
    folder: Path,
) -> tuple[EmbeddingModel, TrainEngine]:
    """The model inside its engine; frozen text features are computed on the way. Collective."""
    seed_everything(config.training.seed)
    model = setup_model(config, spec)
    if config.model.cache_frozen_encoder and has_frozen_text_tower(model):
        cache_text_features(
            model,
            [dataset for dataset in (data.train, data.val) if dataset is not None],
            processor=data.processor,
            folder=folder / "frozen_text_features",
            device=torch.device(get_accelerator().current_device_name()),
            batch_size=config.run.eval_batch_size or config.training.batch_size,
        )
    _spare_unreached(model, data.processor)
    if config.model.gradient_checkpointing:
        for backbone in model.trained_backbones():
            enable_activation_checkpointing(
                backbone, mechanism=config.model.activation_checkpointing, ds_config=ds_config
            )
    optimizer = config.optimizer
    engine = initialize_engine(
        model,
        ds_config=ds_config,
        param_groups=build_param_groups(model, weight_decay=optimizer.weight_decay),
        schedule=build_schedule(
            optimizer.scheduler_type,
            num_steps=intervals.num_steps,
            warmup_steps=optimizer.warmup_steps,
            warmup_ratio=optimizer.warmup_ratio,
        ),
    )
    # Same weights everywhere, but each rank drops out units of its own.
    seed_everything(config.training.seed + 1 + comm.rank())
    return model, engine


def _spare_unreached(model: EmbeddingModel, processor: ItemProcessor) -> None:
    """Keep weight decay from what no embedding depends on."""
    inputs = {stream: processor.pad(stream, [processor.filler(stream)]) for stream in model.streams}
    device = next(model.parameters()).device
    names = mark_unreached(
        model, {s: {k: v.to(device) for k, v in chunk.items()} for s, chunk in inputs.items()}
    )
    if names:
        logger.info("%d parameters are not used (first: %s): no decay", len(names), names[0])


def build_trainer(
    config: Config,
    model: EmbeddingModel,
    engine: TrainEngine,
    data: RunData,
    intervals: Intervals,
    folder: Path,
    *,
    tracker: Tracker | None,
    step: int,
) -> Trainer:
    """The trainer, ready to go on after ``step`` optimizer steps. Collective."""
    training, loading = config.training, config.data
    sampler = GlobalBatchSampler(
        len(data.train),
        global_batch_size=config.training.batch_size * comm.world_size(),
        rank=comm.rank(),
        world_size=comm.world_size(),
        seed=config.training.seed,
        num_steps=intervals.num_steps,
        start_step=step,
    )
    trainer = Trainer(
        engine=engine,
        model=model,
        loader=build_loader(
            data.train,
            sampler,
            num_workers=loading.num_workers,
            prefetch_factor=loading.prefetch_factor,
            pin_memory=loading.pin_memory,
            persistent_workers=loading.persistent_workers,
        ),
        processor=data.processor,
        loss_function=build_loss(
            config.loss.loss_type,
            temperature=config.loss.temperature,
            bidirectional=config.loss.loss_bidirectional,
        ),
        chunk_size=training.gradient_cache_chunk_size if training.use_gradient_cache else None,
        intervals=intervals,
        tracker=tracker,
        save=functools.partial(
            _save,
            config,
            model,
            engine,
            data.processor,
            folder,
            run_identity(config, data, intervals),
        ),
        evaluate=None if data.val is None else lambda: _evaluate(config, data, trainer),
        step=step,
        pin_memory=loading.pin_memory,
    )
    return trainer


def _save(
    config: Config,
    model: EmbeddingModel,
    engine: TrainEngine,
    processor: ItemProcessor,
    folder: Path,
    state: Mapping[str, Any],
    step: int,
) -> Path:
    settings = export_settings(config)
    return save_checkpoint(
        engine.engine,
        output_dir=folder,
        step=step,
        state=state,
        describe=lambda place: describe_model(
            place, model=model, processor=processor, settings=settings
        ),
    )


def _evaluate(config: Config, data: RunData, trainer: Trainer) -> dict[str, float]:
    assert data.val is not None
    return evaluate_retrieval(
        data.val,
        embed=trainer.embed,
        batch_size=config.run.eval_batch_size or config.training.batch_size,
        recall_k=config.run.eval_recall_k,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
        judgments=data.judgments,
    )


def self_test(trainer: Trainer, data: PairDataset, *, precision: str) -> None:
    """Stop the run when chunking changes the gradient of its own model on its own data."""
    first = comm.rank() * SELF_TEST_CANDIDATES
    candidates = range(first, first + SELF_TEST_CANDIDATES)
    batch = collate([data[index % len(data)] for index in candidates])
    comm.raise_together(batch.error)
    difference = check_gradient(
        trainer.engine,
        _unequal_pairs(batch),
        loss_function=trainer.batch_loss,
        pad=trainer.pad,
        streams=trainer.model.streams,
        trainable=trainer.model.trainable,
        fillers=trainer.fillers(),
        tolerance=TOLERANCES[precision],
    )
    if comm.is_main():
        logger.info("gradient self-test passed: chunking moves the gradient by %.1e", difference)


def _unequal_pairs(batch: Batch) -> dict[str, list[EncodedItem]]:
    """The shortest, the middle and the longest pair, so that chunks are padded differently."""
    sizes = [
        sum(array.size for items in batch.roles.values() for array in items[row].inputs.values())
        for row in range(len(batch.indices))
    ]
    order = sorted(range(len(sizes)), key=lambda row: sizes[row])
    chosen = [order[0], order[len(order) // 2], order[-1]]
    return {role: [items[row] for row in chosen] for role, items in batch.roles.items()}


def _open_output(
    config: Config, ds_config: Mapping[str, Any], *, resuming: bool, step: int
) -> Tracker | None:
    """Folder and trackers of the run, on rank 0; before the model, so that mistakes show early."""
    if not comm.is_main():
        return None
    run = config.run
    return build_tracker(
        run.report_to,
        folder=prepare_output(config, ds_config, resuming=resuming),
        run_name=run.run_name,
        config=config.model_dump(mode="json"),
        resume_step=step,
    )


def export_settings(config: Config) -> dict[str, Any]:
    """What ``vembed_config.json`` says beside the shape of the model."""
    return {
        "retrieval_mode": config.data.retrieval_mode,
        "column_mapping": dict(config.data.column_mapping),
        "image_root": config.data.image_root,
        "loss_type": config.loss.loss_type,
        "temperature": config.loss.temperature,
        "precision": config.model.precision,
    }
