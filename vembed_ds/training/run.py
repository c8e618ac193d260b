"""A whole run: check everything cheap, build everything, train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.checkpointing.disks import this_disk
from vembed_ds.checkpointing.frozen import link_frozen_weights
from vembed_ds.checkpointing.restore import load_checkpoint
from vembed_ds.checkpointing.rotation import remove_leftovers
from vembed_ds.checkpointing.saver import SavePolicy, Saver, resume_best
from vembed_ds.config.loading import dump_config
from vembed_ds.config.schema import Config, RunConfig
from vembed_ds.data.collators import Batch, collate
from vembed_ds.data.dataset import Sample
from vembed_ds.data.loader import BatchLoader
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.workers import prepare_server
from vembed_ds.distributed import comm, phases
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.engine.extensions import prepare_extensions
from vembed_ds.engine.replicas import ReplicaCheck
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import ConfigError, VembedError
from vembed_ds.evaluation.retrieval import evaluate_retrieval
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.steps.self_test import TOLERANCES, check_gradient
from vembed_ds.tracking.trackers import Tracker, build_tracker
from vembed_ds.training.data_setup import RunData, dataset_entries, loader_timeout, setup_data
from vembed_ds.training.engine_setup import (
    fill_ds_config,
    inference_batch_size,
    prepare_model,
    start_engine,
)
from vembed_ds.training.facts import training_facts
from vembed_ds.training.guide import embed_guides, guides_identity, load_guides
from vembed_ds.training.loop import Intervals, TrainingLoop
from vembed_ds.training.loss_setup import (
    build_losses,
    check_data,
    evaluated_dims,
    export_loss,
    loss_configs,
    weak_distillation,
)
from vembed_ds.training.memory_report import reports_memory
from vembed_ds.training.model_setup import model_spec
from vembed_ds.training.nonfinite import step_guard
from vembed_ds.training.output import (
    check_own,
    check_shared,
    list_skipped,
    open_output,
    prepare_output,
    warn_of_little_space,
)
from vembed_ds.training.resuming import (
    CONFIGURED,
    EVALUATION_LEFT,
    SETTINGS,
    Resumption,
    check_judges,
    check_resumption,
    choose_checkpoint,
    keep_global_batch,
    run_settings,
)
from vembed_ds.training.run_lock import frees_output, lock_output
from vembed_ds.training.stopping import StopSignals
from vembed_ds.training.stream_setup import setup_stream, some_samples, training_batches
from vembed_ds.training.teacher_sources import Teachers
from vembed_ds.training.teachers import (
    describe_teachers,
    join_student,
    load_teachers,
    prepare_teachers,
    teachers_identity,
)

logger = logging.getLogger(__name__)

SELF_TEST_CANDIDATES = 16  # per rank; three of them are compared


@frees_output
@reports_memory
def train(
    config: Config,
    raw_ds_config: Mapping[str, Any],
    *,
    ds_origin: str,
    resume: str | None,
    origins: Mapping[str, str] | None = None,
    allow_change: Sequence[str] = (),
) -> dict[str, float]:
    """Train as configured, from the data to the last checkpoint.

    Collective, after ``comm.init_distributed``. Everything that can be wrong is looked at
    before the model's weights are loaded.

    Args:
        config: The validated configuration.
        raw_ds_config: DeepSpeed's, with ``"auto"`` where ``config`` decides.
        ds_origin: Where that came from, for messages.
        resume: A checkpoint, a run's folder, ``"auto"``, or ``None`` for a fresh start.
        origins: Where the values of ``config`` came from, for messages; from
            :func:`setting_origins`.
        allow_change: Settings that may differ from the checkpoint's, by name.

    Returns:
        The last evaluation's metrics; empty where nothing was left to train.

    Raises:
        VembedError: On every rank.
        OutOfMemoryError: On the rank that has no memory.
    """
    phases.set_place("preparing the run")
    configured = config.training.batch_size
    disk = this_disk(node_local=config.run.node_local_output)
    resumption = choose_checkpoint(
        resume,
        output_dir=config.run.output_dir,
        allowed=allow_change,
        node_local=config.run.node_local_output,
    )
    if resumption is not None:
        config = keep_global_batch(config, resumption)
    ds_config = fill_ds_config(config, raw_ds_config, origin=ds_origin, origins=origins or {})
    stage = ds_config["zero_optimization"]["stage"]
    entries = dataset_entries(config.data)
    losses = loss_configs(config.loss, entries)
    spec = model_spec(config.model, layers=losses[0].mrl_layers or ())
    with phase(Kind.OTHER, "reading the data"):
        data = setup_stream(config, spec) if config.data.streaming else setup_data(config, spec)
    check_data(losses, data.members, config.distillation)
    if notice := weak_distillation(config):
        logger.warning("%s", notice)
    if config.data.num_workers:
        prepare_server(data.train)  # imports beside what follows here
    intervals = plan_run(config, per_epoch=data.steps_per_epoch)
    settings = run_settings(config, ds_config, data, intervals)
    if resumption is not None and not check_resumption(
        resumption, settings, num_steps=intervals.num_steps, evaluates=bool(data.val)
    ):
        return {}
    step = 0 if resumption is None else resumption.step
    folder = Path(config.run.output_dir)
    if config.run.node_local_output:
        check_own(folder, disk)
    tracker = comm.run_together(
        lambda: _open_output(config, ds_config, data.skipped, resumption=resumption),
        doing=f"output_dir={config.run.output_dir!r}",
    )
    if not config.run.node_local_output:
        check_shared(folder)
    comm.run_together(
        lambda: remove_leftovers(folder) if disk.leads else None,
        doing=f"output_dir={config.run.output_dir!r}",
    )
    with phase(Kind.OTHER, "building extensions"):
        prepare_extensions(ds_config)
    with phase(Kind.TEACHER, "loading guides and teachers"):
        guides, loaded = load_guides(losses, data), load_teachers(config, data)
    judges = guides_identity(guides) | teachers_identity(loaded)
    if resumption is not None:
        check_judges(resumption, judges)
    with phase(Kind.TEACHER, "embedding the data with guides and teachers"):
        vectors = embed_guides(guides, config, data, folder=folder)
        del guides  # they need no memory any more
        teachers = prepare_teachers(
            loaded, config, data, step=step, steps_per_epoch=intervals.steps_per_epoch
        )
    prefixes = sorted({dim for loss in losses for dim in evaluated_dims(loss)})
    with phase(Kind.LOADING, "loading the model"):
        model, width = prepare_model(
            config, spec, data, folder, zero_stage=stage, mrl_dims=prefixes
        )
        join_student(teachers, model, config, width=width, mrl_dims=prefixes)
        if comm.is_main():
            warn_of_little_space(folder, model.parameters())
    with phase(Kind.BUILDING):
        engine = start_engine(config, model, ds_config, intervals)
    if resumption is not None:
        with phase(Kind.LOADING, f"loading {resumption.folder.name}"):
            load_checkpoint(engine.engine, resumption.folder, seed=config.training.seed)
            teachers.load(resumption.folder)
    saver = Saver(
        engine.engine,
        output_dir=folder,
        policy=save_policy(config.run),
        config_digest=config_digest(config),
        best=resume_best(
            None if resumption is None else resumption.folder,
            folder,
            metric=config.run.best_metric,
            node_local=config.run.node_local_output,
        ),
    )
    loop = build_loop(
        config,
        model,
        engine,
        data,
        intervals,
        saver,
        {
            SETTINGS: settings | judges,
            CONFIGURED: configured,
            **describe_teachers(loaded),
        },
        tracker=tracker,
        step=step,
        saved=_own_checkpoint(resumption, config),
        evaluation_left=resumption is not None and resumption.evaluation_left,
        attach=vectors.attach,
        teachers=teachers,
    )
    if config.training.gradient_self_test:
        phases.set_place("gradient self-test")
        self_test(loop, data, precision=config.model.precision)
    try:
        return loop.train()
    finally:
        saver.close()


def save_policy(run: RunConfig) -> SavePolicy:
    """What the configuration says of checkpoints."""
    return SavePolicy(
        total_limit=run.save_total_limit,
        best_metric=run.best_metric,
        on_error=run.on_save_error,
        background=run.save_async,
        timeout_minutes=run.timeout_minutes,
        node_local=run.node_local_output,
    )


def config_digest(config: Config) -> str:
    """Tells two resolved configurations apart."""
    return xxhash.xxh3_128(dump_config(config).encode()).hexdigest()


def plan_run(config: Config, *, per_epoch: int | None) -> Intervals:
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


def build_loop(
    config: Config,
    model: EmbeddingModel,
    engine: TrainEngine,
    data: RunData,
    intervals: Intervals,
    saver: Saver,
    state: Mapping[str, Any],
    *,
    tracker: Tracker | None,
    step: int,
    saved: Path | None,
    evaluation_left: bool,
    attach: Callable[[Batch], Batch],
    teachers: Teachers,
) -> TrainingLoop:
    """The loop, ready to go on after ``step`` optimizer steps. Collective."""
    training, loading = config.training, config.data
    signals = StopSignals()
    batches = training_batches(
        data,
        num_steps=intervals.num_steps,
        start_step=step,
        timeout_seconds=loader_timeout(config),
        interrupted=signals.pending,
    )
    loop = TrainingLoop(
        engine=engine,
        model=model,
        loader=BatchLoader(
            data.train,
            batches,
            num_workers=loading.num_workers,
            prefetch_factor=loading.prefetch_factor,
            timeout_seconds=loader_timeout(config),
            interrupted=signals.pending,
        ),
        processor=data.processor,
        loss_functions=build_losses(
            loss_configs(config.loss, dataset_entries(config.data)),
            config.distillation,
            num_steps=intervals.num_steps,
        ),
        chunk_size=training.gradient_cache_chunk_size if training.use_gradient_cache else None,
        intervals=intervals,
        tracker=tracker,
        save=lambda step: _save(
            config,
            model,
            saver,
            data.processor,
            {**state, EVALUATION_LEFT: loop.evaluation_left},
            teachers,
            step,
        ),
        judge=saver.judge,
        finish_saving=saver.finish,
        save_failure=saver.failure,
        guard=step_guard(config, engine, Path(config.run.output_dir), locate=data.train.locate),
        replicas=ReplicaCheck(engine, every=training.replica_check_steps),
        evaluate=None if not data.val else lambda: _evaluate(config, data, loop),
        step=step,
        saved=saved,
        evaluation_left=evaluation_left,
        signals=signals,
        pin_memory=loading.pin_memory,
        attach=attach,
        teachers=teachers,
    )
    return loop


def _save(
    config: Config,
    model: EmbeddingModel,
    saver: Saver,
    processor: ItemProcessor,
    state: Mapping[str, Any],
    teachers: Teachers,
    step: int,
) -> Path | None:
    def describe(place: Path) -> None:
        settings = export_settings(config)
        stage = saver.engine.zero_optimization_stage()
        facts = training_facts(config, step=step, zero_stage=stage, settings=state[SETTINGS])
        describe_model(place, model=model, processor=processor, settings=settings, facts=facts)
        link_frozen_weights(saver.output_dir, place)

    return saver.save(step, state=state, describe=describe, write=teachers.save)


def _evaluate(config: Config, data: RunData, loop: TrainingLoop) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, found in data.val.items():
        measured = evaluate_retrieval(
            found.dataset,
            embed=loop.embed,
            batch_size=inference_batch_size(config),
            recall_k=config.run.eval_recall_k,
            num_workers=config.data.num_workers,
            prefetch_factor=config.data.prefetch_factor,
            timeout_seconds=loader_timeout(config),
            dims=evaluated_dims(config.loss),
            judgments=found.judgments,
        )
        prefix = f"{name}/" if name else ""
        metrics |= {prefix + metric: value for metric, value in measured.items()}
    return metrics


def self_test(loop: TrainingLoop, data: RunData, *, precision: str) -> None:
    """Stop the run when chunking changes the gradient of its own model on its own data."""
    samples = some_samples(data, number=SELF_TEST_CANDIDATES)
    comm.raise_together(next((s for s in samples if isinstance(s, VembedError)), None))
    chosen = _unequal([sample for sample in samples if isinstance(sample, Sample)])
    batch = loop.attach(collate(chosen))
    comm.raise_together(batch.error)
    said = loop.teachers.judge(batch, loop.plan(batch), loop.pad)
    difference = check_gradient(
        loop.engine,
        batch.roles,
        loss_function=loop.batch_loss(batch, said),
        pad=loop.pad,
        streams=loop.model.streams,
        trainable=loop.model.trainable,
        fillers=loop.fillers(loop.agree_on_counts(batch)),
        tolerance=TOLERANCES[precision],
    )
    if comm.is_main():
        logger.info(
            "gradient self-test passed: chunking moves the gradient by %.1e of its norm (limit %.0e)",
            difference,
            TOLERANCES[precision],
        )


def _unequal(samples: Sequence[Sample]) -> list[Sample]:
    """The shortest, the middle and the longest, so that chunks are padded differently."""

    def size(sample: Sample) -> int:
        items = chain.from_iterable(sample.roles.values())
        return sum(array.size for item in items for array in item.inputs.values())

    ordered = sorted(samples, key=size)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _open_output(
    config: Config,
    ds_config: Mapping[str, Any],
    skipped: Sequence[str],
    *,
    resumption: Resumption | None,
) -> Tracker | None:
    """Folder and trackers of the run, on rank 0; before the model, so that mistakes show early."""
    run = config.run
    if not this_disk(node_local=run.node_local_output).leads:
        return None
    resuming = _own_checkpoint(resumption, config) is not None
    lock_output(open_output(run.output_dir))
    folder = prepare_output(config, ds_config, resuming=resuming)
    if not comm.is_main():
        return None  # another machine's disk
    list_skipped(folder, skipped)
    return build_tracker(
        run.report_to,
        folder=folder,
        run_name=run.run_name,
        config=config.model_dump(mode="json"),
        resume_step=resumption.step if resumption is not None else 0,
        patient=run.on_save_error == "warn",
    )


def _own_checkpoint(resumption: Resumption | None, config: Config) -> Path | None:
    """Where this very run goes on from; ``None``: it begins, or goes on from another one's."""
    if resumption is None or not resumption.belongs_to(config.run.output_dir):
        return None
    return resumption.folder


def export_settings(config: Config) -> dict[str, Any]:
    """What ``vembed_config.json`` says beside the shape of the model.

    What differs between the data sets is null there: no reader may take one for all.
    """
    entries = [entry.model_dump() for entry in dataset_entries(config.data).values()]
    names = (
        "retrieval_mode",
        "column_mapping",
        "image_root",
        "query_instruction",
        "document_instruction",
    )
    shared = {
        name: entries[0][name] if all(e[name] == entries[0][name] for e in entries) else None
        for name in names
    }
    return {
        **shared,
        "prompt": config.data.prompt,
        **export_loss(config.loss),
        "precision": config.model.precision,
    }
