"""A whole run: check everything cheap, build everything, train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.restore import load_checkpoint
from vembed_ds.checkpointing.saver import Saver
from vembed_ds.config.schema import Config
from vembed_ds.data.collators import Batch
from vembed_ds.data.loader import BatchLoader
from vembed_ds.distributed import comm, phases
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.engine.extensions import prepare_extensions
from vembed_ds.engine.replicas import ReplicaCheck
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.evaluation.measuring import training_metrics
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.planning.parameters import ModelSize, size_of
from vembed_ds.run_lock import frees_output
from vembed_ds.tracking.callback_sink import CallbackSink
from vembed_ds.tracking.trackers import Tracker
from vembed_ds.training.banner import banner
from vembed_ds.training.chunk_choice import choose_chunks
from vembed_ds.training.data_setup import RunData, dataset_entries, loader_timeout
from vembed_ds.training.engine_setup import (
    inference_batch_size,
    prepare_model,
    read_model,
    start_engine,
)
from vembed_ds.training.frozen_base import FROZEN, check_frozen, digest_frozen
from vembed_ds.training.guide import embed_guides, guides_identity, load_guides
from vembed_ds.training.log_window import resumed_window
from vembed_ds.training.loop import Intervals, TrainingLoop
from vembed_ds.training.loss_setup import build_losses, evaluated_dims, loss_configs
from vembed_ds.training.memory_report import reports_memory
from vembed_ds.training.memory_setup import (
    BUDGET,
    is_to_be_chosen,
    resumed_budget,
    saved_budget,
    step_memory,
    tell_resumed_budget,
)
from vembed_ds.training.model_setup import own_rates
from vembed_ds.training.nonfinite import step_guard
from vembed_ds.training.output import warn_of_little_space
from vembed_ds.training.plan import RunPlan, plan_run
from vembed_ds.training.resuming import (
    CONFIGURED,
    EARLIER,
    EVALUATION_LEFT,
    SETTINGS,
    WINDOW,
    Resumption,
    check_judges,
    check_resumption,
    chosen_checkpoint,
    earlier_parts,
)
from vembed_ds.training.run_facts import end_facts, planned_facts, start_facts
from vembed_ds.training.run_folder import begin_output, claim_output
from vembed_ds.training.run_saving import build_saver, save_step
from vembed_ds.training.self_test import examine
from vembed_ds.training.stopping import StopSignals
from vembed_ds.training.stream_setup import training_batches
from vembed_ds.training.summary import summary
from vembed_ds.training.teacher_sources import Teachers
from vembed_ds.training.teachers import (
    describe_teachers,
    join_student,
    load_teachers,
    prepare_teachers,
    teachers_identity,
)

logger = logging.getLogger(__name__)

DRY_RUN = ", a dry run: nothing was trained or written"


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
    process_ends: bool = False,
    on_log: Callable[[Mapping[str, float], int], object] | None = None,
    how_to_go_on: str | None = None,
    dry_run: bool = False,
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
        process_ends: As of :class:`StopSignals`.
        on_log: Called on rank 0 with what is logged, and the step; its errors end no run.
        how_to_go_on: What a user types to go on with a run that was stopped; ``None``: the command's option.
        dry_run: Say what would be trained, before any model is loaded, and leave nothing behind.

    Returns:
        The last evaluation's metrics; empty where nothing was left to train, or was to be.

    Raises:
        VembedError: On every rank.
        OutOfMemoryError: On the rank that has no memory.
    """
    phases.set_place("preparing the run")
    claim_output(config.run)
    with chosen_checkpoint(
        resume,
        output_dir=config.run.output_dir,
        allowed=allow_change,
        node_local=config.run.node_local_output,
    ) as resumption:
        plan = plan_run(
            config,
            raw_ds_config,
            ds_origin=ds_origin,
            origins=origins or {},
            resumption=resumption,
        )
        if resumption is not None and not check_resumption(
            resumption,
            plan.settings,
            num_steps=plan.intervals.num_steps,
            evaluates=bool(plan.data.val),
        ):
            return {}
        if dry_run:
            _say(banner(planned_facts(plan, resumption), note=DRY_RUN))
            return {}
        loop, saver, model = _build(plan, resumption, process_ends=process_ends)
    if on_log is not None and loop.tracker is not None:
        loop.tracker.add("on_log", CallbackSink(on_log))
    loop.how_to_go_on = how_to_go_on or loop.how_to_go_on
    try:
        phases.set_place("before the first step")
        if is_to_be_chosen(config.training, resumption):
            choose_chunks(loop, plan)
        examine(loop, plan.data, config.training, precision=config.model.precision)
        facts = start_facts(plan, model.size, loop, resumption, width=model.width)
        _say(banner(facts))
        metrics = loop.train()
        _say(summary(end_facts(plan, loop, saver)))
        return metrics
    finally:
        saver.close()


def _build(
    plan: RunPlan, resumption: Resumption | None, *, process_ends: bool
) -> tuple[TrainingLoop, Saver, _Model]:
    """The loop where the checkpoint left it, who writes the next ones, and the model's size. Collective."""
    config, data = plan.config, plan.data
    tracker = begin_output(config, plan.ds_config, data.skipped, resumption=resumption)
    with phase(Kind.OTHER, "building extensions"):
        prepare_extensions(plan.ds_config)
    judges = _prepare_judges(plan, resumption)
    with phase(Kind.LOADING, "loading the model"):
        model = read_model(config, plan.spec, data, zero_stage=plan.zero_stage)
        frozen = digest_frozen(model)
        if resumption is not None:
            check_frozen(resumption, frozen, model_name=config.model.model_name)
        width = prepare_model(config, model, data, plan.folder, mrl_dims=plan.prefixes)
        join_student(judges.teachers, model, config, width=width, mrl_dims=plan.prefixes)
        if comm.is_main():
            warn_of_little_space(plan.folder, model.parameters())
        size = size_of(  # before ZeRO-3 takes the parameters apart
            model,
            weight_decay=config.optimizer.weight_decay,
            load_in_4bit=config.model.load_in_4bit,
        )
    with phase(Kind.BUILDING):
        engine = start_engine(config, model, plan.ds_config, plan.intervals)
    if resumption is not None:
        with phase(Kind.LOADING, f"loading {resumption.folder.name}"):
            load_checkpoint(engine.engine, resumption.folder, seed=config.training.seed)
            judges.teachers.load(resumption.folder)
    saver = build_saver(config, engine, resumption)
    loop = build_loop(
        config,
        model,
        engine,
        data,
        plan.intervals,
        saver,
        {
            SETTINGS: plan.settings | judges.identity,
            CONFIGURED: plan.configured_batch_size,
            EARLIER: earlier_parts(resumption, plan.settings),
            FROZEN: frozen,
            **judges.described,
        },
        tracker=tracker,
        resumption=resumption,
        attach=judges.attach,
        teachers=judges.teachers,
        process_ends=process_ends,
    )
    return loop, saver, _Model(size, width)


def _say(text: str) -> None:
    """On rank 0, lines that belong together."""
    if comm.is_main():
        logger.info("\n%s", text)


@dataclass(frozen=True)
class _Model:
    """What is known of the model before it is in its engine.

    Attributes:
        size: Its parameters.
        width: Dimensions of an embedding.
    """

    size: ModelSize
    width: int


@dataclass(frozen=True)
class _Judges:
    """Guides and teachers of a run.

    Attributes:
        attach: Adds to a batch what guides stored of it.
        teachers: Whom the student follows.
        identity: Digests of all, by the names of the settings that they are.
        described: What checkpoints say of the teachers.
    """

    attach: Callable[[Batch], Batch]
    teachers: Teachers
    identity: dict[str, str]
    described: dict[str, Any]


def _prepare_judges(plan: RunPlan, resumption: Resumption | None) -> _Judges:
    """Load guides and teachers, and let them embed what they can beforehand. Collective."""
    config, data = plan.config, plan.data
    with phase(Kind.TEACHER, "loading guides and teachers"):
        guides, loaded = load_guides(plan.losses, data), load_teachers(config, data)
    identity = guides_identity(guides) | teachers_identity(loaded)
    if resumption is not None:
        check_judges(resumption, identity)
    with phase(Kind.TEACHER, "embedding the data with guides and teachers"):
        vectors = embed_guides(guides, config, data, folder=plan.folder)
        del guides  # they need no memory any more
        teachers = prepare_teachers(
            loaded,
            config,
            data,
            step=0 if resumption is None else resumption.step,
            steps_per_epoch=plan.intervals.steps_per_epoch,
        )
    return _Judges(vectors.attach, teachers, identity, describe_teachers(loaded))


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
    resumption: Resumption | None,
    attach: Callable[[Batch], Batch],
    teachers: Teachers,
    process_ends: bool = False,
) -> TrainingLoop:
    """The loop, ready to go on from what was resumed. Collective."""
    training, loading = config.training, config.data
    budget = resumed_budget(training, resumption)
    tell_resumed_budget(training, budget)
    signals = StopSignals(process_ends=process_ends)
    step = 0 if resumption is None else resumption.step
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
            tile_size=training.loss_tile_size,
        ),
        budget=budget,
        intervals=intervals,
        tracker=tracker,
        save=lambda step: save_step(
            config,
            model,
            saver,
            data.processor,
            {
                **state,
                EVALUATION_LEFT: loop.evaluation_left,
                WINDOW: loop.window.state(),
                BUDGET: saved_budget(loop.budget),
            },
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
        saved=None if resumption is None else resumption.own_folder(config.run.output_dir),
        evaluation_left=resumption is not None and resumption.evaluation_left,
        window=None if resumption is None else resumed_window(resumption.state.get(WINDOW)),
        signals=signals,
        pin_memory=loading.pin_memory,
        attach=attach,
        teachers=teachers,
        memory=step_memory(config, engine),
        data_names=_data_names(config),
        rates=own_rates(config.optimizer),
    )
    return loop


def _data_names(config: Config) -> list[str]:
    """Of the data sets, where a step has records of one only."""
    entries = dataset_entries(config.data)
    return list(entries) if len(entries) > 1 and config.data.batching == "homogeneous" else []


def _evaluate(config: Config, data: RunData, loop: TrainingLoop) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, found in data.val.items():
        measured = training_metrics(
            found.task,
            embed=loop.embed,
            batch_size=inference_batch_size(config),
            ks=config.run.eval_recall_k,
            num_workers=config.data.num_workers,
            prefetch_factor=config.data.prefetch_factor,
            timeout_seconds=loader_timeout(config),
            dims=evaluated_dims(config.loss),
        )
        prefix = f"{name}/" if name else ""
        metrics |= {prefix + metric: value for metric, value in measured.items()}
    return metrics
