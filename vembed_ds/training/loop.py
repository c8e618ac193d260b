"""The training loop."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vembed_ds.data.batches import Layout, StepPlan, lay_out
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.collators import Batch
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.waiting import WaitInterrupted
from vembed_ds.distributed import comm, phases
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.distributed.seeding import capture_rng, restore_rng
from vembed_ds.engine.replicas import ReplicaCheck
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import SaveError, StoppedError, VembedError
from vembed_ds.losses import LossFunction, Watched
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import BatchLoss, StepResult, compute_gradient, embed_plan
from vembed_ds.steps.kept_graphs import KeptGraphs
from vembed_ds.steps.shortage import MemoryShortage, emptied
from vembed_ds.tracking.trackers import Tracker
from vembed_ds.training.embedding_figures import EmbeddingSample
from vembed_ds.training.log_line import SeenStep, log_line, peak_device_bytes
from vembed_ds.training.log_text import log_text
from vembed_ds.training.log_window import LogWindow
from vembed_ds.training.loss_inputs import loss_inputs
from vembed_ds.training.nonfinite import StepGuard
from vembed_ds.training.saves import Saves
from vembed_ds.training.step_memory import StepMemory
from vembed_ds.training.step_work import work_of
from vembed_ds.training.stopping import StopRequested, StopSignals, raise_agreed
from vembed_ds.training.summary import RunRecord
from vembed_ds.training.teacher_sources import NO_TEACHERS, Said, Teachers

logger = logging.getLogger(__name__)

"""What the log shows of the metrics."""


@dataclass(frozen=True)
class Intervals:
    """How often things happen, in optimizer steps; 0: only at the end."""

    num_steps: int
    steps_per_epoch: int | None  # None: a stream, whose end nobody knows
    logging_steps: int
    eval_steps: int = 0
    save_steps: int = 0
    save_minutes: float | None = None  # since the last checkpoint of any kind; None: never
    eval_on_start: bool = True
    save_epochs: int = 0

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step``."""
        epochs = self.save_epochs * (self.steps_per_epoch or 0)
        return self.due(self.save_steps, step) or self.due(epochs, step)

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens every ``every`` steps happens after ``step``."""
        return step == self.num_steps or (every > 0 and step % every == 0)


class TrainingLoop:
    """Trains to the end, then evaluates and saves.

    Args:
        engine: Wraps ``model``.
        model: The model inside the engine.
        loader: Batches of this rank from ``step`` on.
        processor: Pads chunks.
        loss_functions: From :func:`build_loss`, of every data set.
        budget: Of the chunks of every stream; with everything in one, the standard step.
        intervals: When to log, evaluate, save and stop.
        tracker: Gets the metrics; ``None`` on all ranks but 0.
        save: ``write`` of :class:`Saves`; collective.
        judge: Whether an evaluation after a step calls for a checkpoint; collective.
        finish_saving: ``finish`` of :class:`Saves`; collective.
        save_failure: ``failure`` of :class:`Saves`.
        guard: Decides whether a step may be made.
        replicas: Compares what all ranks hold.
        evaluate: Retrieval metrics of the validation data; collective; ``None``: no data.
        step: Optimizer steps already done.
        saved: The checkpoint of ``step``, where it is one of this run's own.
        evaluation_left: Whether the evaluation after ``step`` was left by a signal.
        window: What was seen since the last log line; ``None``: nothing.
        signals: Whom the loader asks too while it waits; ``None``: nobody is asked there.
        pin_memory: Page-lock padded chunks, for faster copies to an accelerator.
        attach: Adds to every batch what the loss needs of it beside its items, or an ``error``.
        teachers: Whom the student follows.
        memory: What becomes smaller when a step has none; ``None``: the last chunk alone keeps its
            graph.
        data_names: Of the data sets, where every batch comes from one, for the log.
        rates: Highest learning rates of parts that have their own, by name, for the log.
    """

    how_to_go_on = "start again with --resume auto"

    def __init__(
        self,
        *,
        engine: TrainEngine,
        model: EmbeddingModel,
        loader: Iterable[Batch],
        processor: ItemProcessor,
        loss_functions: Sequence[LossFunction],
        budget: ChunkBudget,
        intervals: Intervals,
        tracker: Tracker | None,
        save: Callable[[int], Path | None],
        guard: StepGuard,
        replicas: ReplicaCheck,
        judge: Callable[[int, Mapping[str, float]], bool] = lambda step, metrics: False,
        finish_saving: Callable[[], Path | None] = lambda: None,
        save_failure: Callable[[], SaveError | None] = lambda: None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        step: int = 0,
        saved: Path | None = None,
        evaluation_left: bool = False,
        window: LogWindow | None = None,
        signals: StopSignals | None = None,
        pin_memory: bool = False,
        attach: Callable[[Batch], Batch] = lambda batch: batch,
        teachers: Teachers = NO_TEACHERS,
        memory: StepMemory | None = None,
        data_names: Sequence[str] = (),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.engine, self.model, self.processor = engine, model, processor
        self.loader, self.budget = loader, budget
        self.loss_functions = list(loss_functions)
        self.intervals, self.tracker = intervals, tracker
        self._judge, self._evaluate, self._attach = judge, evaluate, attach
        self.teachers, self.guard, self.replicas = teachers, guard, replicas
        self.memory = memory or StepMemory(KeptGraphs(), can_agree=engine.chunks_are_local)
        self.step = step
        self._saves = Saves(
            write=save,
            finish=finish_saving,
            failure=save_failure,
            minutes=intervals.save_minutes,
            newest=saved,
        )
        self.evaluation_left = evaluation_left
        self._save_is_late = False
        self._signals = signals or StopSignals()
        self._pin_memory = pin_memory and engine.device.type != "cpu"
        self._filler = functools.cache(processor.filler)
        self.merged: frozenset[str] = frozenset()  # streams whose equal items are one row
        self._parts: dict[str, Tensor] = {}  # of the last loss
        self._seen: SeenStep | None = None  # of a step that is logged
        self._data_names, self._rates = list(data_names), dict(rates or {})
        self._num_chunks = self._peak_device_bytes = 0
        self.record = RunRecord()
        self.window = window or LogWindow()
        self._progress: tqdm[Any] | None = None
        self._error: VembedError | None = None  # of this rank, until all hear of it

    def train(self) -> dict[str, float]:
        """Run to the last step. Collective.

        Returns:
            The last evaluation's metrics; empty without validation data.

        Raises:
            StoppedError: On every rank, when a signal stopped the run; its checkpoint is written.
        """
        with self._signals:
            try:
                with logging_redirect_tqdm():
                    return self._train()
            except StopRequested as request:
                stopped = StoppedError(f"stopped by {request.cause} {self._place_to_go_on()}")
            finally:
                if self.tracker is not None:
                    self.tracker.close()
            # Launchers end all ranks as soon as one exits: none does before the trackers are closed.
            comm.barrier()
            raise stopped

    def _place_to_go_on(self) -> str:
        """Save what is not saved yet, and say how to go on. Collective."""
        if self.step == 0:
            return "before the first step, so that there is nothing to save: start again"
        self._save_unless_saved()
        return self._saves.place_to_go_on(self.step, how=self.how_to_go_on)

    def _save_unless_saved(self) -> None:
        if not self._saves.has(self.step):
            self.save()

    def _train(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        started = time.perf_counter()
        if self.step == 0 and self.intervals.eval_on_start:
            metrics = self.evaluate()
        elif self.evaluation_left:
            metrics = self.evaluate()
            if metrics:
                self._judge(self.step, metrics)
                self.save()  # the same step again, or every later start would evaluate it again
        self.model.train()
        progress: tqdm[Any] = tqdm(
            initial=self.step,
            total=self.intervals.num_steps,
            disable=None if comm.is_main() else True,  # None: only on a terminal
        )
        self._progress = progress
        for batch in self.batches():
            result, rates = self.compute_gradient(batch), self._learning_rates()
            rate = rates["train/lr"]
            sound = self.guard.accept(result, batch, step=self.step + 1, learning_rate=rate)
            norm = self.engine.step() if sound else None
            self.step += 1
            self.teachers.after_step(self.step, updated=norm is not None)
            self.replicas.after_step(self.step)
            self.log(result, norm, rates, num_pairs=len(batch.indices), sound=sound)
            is_best = False
            if self.intervals.due(self.intervals.eval_steps, self.step):
                metrics = self.evaluate()
                is_best = bool(metrics) and self._judge(self.step, metrics)
            if is_best or self._save_is_late or self.intervals.save_due(self.step):
                self.save()
        progress.close()
        self._save_unless_saved()
        self._saves.require(self.step)
        self._begin_window()  # with what the last checkpoint took
        self.record.seconds = time.perf_counter() - started
        comm.raise_together(self._error)
        return metrics

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, and the time they were waited for."""
        self.window.started = waited = time.perf_counter()
        batches = iter(self.loader)
        while True:
            phases.set_place(f"step {self.step + 1}")
            try:
                with phase(Kind.DATA):
                    batch = next(batches, None)
            except WaitInterrupted:
                yield Batch(indices=[], roles={})  # to tell the others, who may have theirs
                return
            if batch is None:
                return
            self.window.waited += time.perf_counter() - waited
            yield self.attach(batch)
            waited = time.perf_counter()

    def attach(self, batch: Batch) -> Batch:
        """The batch with what guides and teachers stored of it, or with an ``error``. Local."""
        return self.teachers.attach(self._attach(batch))

    def compute_gradient(self, batch: Batch) -> StepResult:
        """Gradient of the global batch, reduced, left in the engine. Collective.

        Where memory runs out, it is computed again from the start, with what takes less.
        """
        plan = self.plan(batch)
        # Once, before anything is embedded with gradient; neither the replay nor a second attempt
        # asks again.
        with phase(Kind.TEACHER):
            said = self.teachers.judge(batch, plan, self.pad)
        start = capture_rng(self.engine.device)
        while True:
            self.memory.begin(plan, self.budget)
            try:
                with self.memory.explained():
                    result = compute_gradient(
                        self.engine,
                        plan,
                        loss_function=self.batch_loss(batch, said),
                        pad=self.pad,
                        trainable=self.model.trainable,
                        graphs=self.memory.graphs,
                        agree=self.memory.agree,
                    )
            except MemoryShortage as error:
                shortage = emptied(error)
            else:
                self._count(plan)
                return result
            # Outside of the handler, which would hold the tensors of the attempt.
            self.engine.discard_gradients()
            self.budget = self.memory.make_room(shortage)
            restore_rng(start, self.engine.device)
            plan = self.plan(batch)

    def _count(self, plan: StepPlan) -> None:
        kept, self._num_chunks = self.memory.graphs.number, len(plan.chunks)
        work = work_of(plan, kept=kept, trainable=self.model.trainable)
        self.window.work = self.window.work.plus(work)

    def plan(self, batch: Batch) -> StepPlan:
        """The chunks of a batch. Collective.

        Raises:
            VembedError: On every rank, when any rank's batch could not be read.
        """
        layout = lay_out(batch.roles, budget=self.budget, merged=self.merged)
        counts = self.agree_on_counts(batch, layout)
        return layout.plan(counts, filler=self._filler)

    def agree_on_counts(self, batch: Batch, layout: Layout) -> dict[str, int]:
        """Per stream, the largest number of chunks on any rank. Collective.

        The ranks also agree here whether a signal stops them, and whether it is time to save.

        Raises:
            VembedError: On every rank, when any rank's batch could not be read, or what it logged
                could not be written.
            StopRequested: On every rank, when any was asked to stop.
        """
        streams = self.model.streams
        error = batch.error or self._error
        failed = int(error is not None)
        flags = [failed, self._signals.flag(), int(comm.is_main() and self._saves.is_late())]
        # One host-side reduction tells all.
        agreed = comm.all_max([*flags, *layout.count_chunks(streams)])
        any_failed, stop, save_is_late, *counts = agreed
        if any_failed:
            comm.raise_together(error)
        raise_agreed(stop)
        self._save_is_late = bool(save_is_late)
        return dict(zip(streams, counts, strict=True))

    def batch_loss(self, batch: Batch, said: Sequence[Said] = ()) -> BatchLoss:
        """The loss as a function of the embeddings of one batch; collective when called.

        Args:
            batch: The records.
            said: What every teacher says of them.
        """

        def loss(rows: Mapping[str, Embeddings], learned: Mapping[str, Tensor]) -> Tensor:
            self.guard.watch(rows)
            self._seen = self._see(rows)
            watched = None if self._seen is None else self._seen.watched
            inputs = loss_inputs(
                batch, rows, learned, teachers=said, step=self.step, watched=watched
            )
            found = self.loss_functions[batch.member](inputs)
            self._parts = inputs.parts
            if self._data_names:
                self._parts[f"data_{self._data_names[batch.member]}"] = found.detach()
            return found

        return loss

    def _see(self, rows: Mapping[str, Embeddings]) -> SeenStep | None:
        """What is kept of the embeddings of a step that is logged."""
        if not self._line_is_due(self.step + 1):
            return None
        return SeenStep(EmbeddingSample(rows, num_layers=self.model.num_layers), Watched())

    def pad(self, stream: str, items: Sequence[EncodedItem]) -> dict[str, Tensor]:
        """Items of a chunk to one batch on the host."""
        inputs = self.processor.pad(stream, items)
        return {k: v.pin_memory() for k, v in inputs.items()} if self._pin_memory else inputs

    def embed(self, items: Sequence[EncodedItem]) -> Embeddings:
        """Embeddings of items of any streams, float32, without gradient. Collective."""
        batch = Batch(indices=[], roles={"items": list(items)})
        layout = lay_out(batch.roles, budget=ChunkBudget(items=None))
        plan = layout.plan(self.agree_on_counts(batch, layout), filler=self._filler)
        rows = embed_plan(self.engine, plan, pad=self.pad)["items"]
        return rows.dims(rows.width - rows.width // self.model.num_layers, rows.width)

    def evaluate(self) -> dict[str, float]:
        """Evaluate, log and return the metrics; the model is in training mode afterwards."""
        if self._evaluate is None:
            self.evaluation_left = False
            return {}
        self.evaluation_left = True
        with self.window.paused("evaluation"), phase(Kind.EVALUATION):
            self.model.eval()
            metrics = {f"eval/{name}": value for name, value in self._evaluate().items()}
            self.model.train()
            self._report(metrics)
        self.record.note_evaluation(self.step, metrics)
        self.evaluation_left = False
        return metrics

    def save(self) -> None:
        """Write a checkpoint. Collective."""
        saving = phase(Kind.SAVING, f"saving checkpoint-step-{self.step}")
        with self.window.paused("checkpoint"), saving:
            self.replicas.require_equal(self.step)
            self.teachers.before_save()
            self._saves.write(self.step)
        self._save_is_late = False

    def log(
        self,
        result: StepResult,
        norm: Tensor | None,
        rates: Mapping[str, float],
        *,
        num_pairs: int,
        sound: bool,
    ) -> None:
        """Add a step to the window; write the window when it is due. Collective then.

        Args:
            result: Of the step.
            norm: Of its gradient; ``None``: there was no update.
            rates: Learning rates of the update, by name.
            num_pairs: Of this rank.
            sound: Whether loss and gradient were finite.
        """
        window, seen, self._seen = self.window, self._seen, None
        if sound:
            window.add(result.loss, self._parts)
        window.timed += 1
        window.pairs += num_pairs
        self.record.steps += 1
        self.record.pairs += num_pairs * comm.world_size()
        window.skipped += norm is None
        if self._progress is not None:
            self._progress.update()
        if not self._line_is_due(self.step):
            return
        self._peak_device_bytes = max(self._peak_device_bytes, peak_device_bytes())
        metrics = log_line(
            window,
            result=result,
            norm=norm,
            rates=rates,
            seen=seen if sound else None,
            sent_bytes=self._sent_bytes(seen),
            peak_device_bytes=self._peak_device_bytes,
        )
        if self.intervals.steps_per_epoch:
            metrics["train/epoch"] = self.step / self.intervals.steps_per_epoch
        self.record.note_line(metrics)
        self._begin_window()
        self._report(metrics)

    def _begin_window(self) -> None:
        self.record.note_times(self.window)
        self.window = LogWindow()

    def _line_is_due(self, step: int) -> bool:
        """Whether a log line follows ``step``: by interval, and behind the first and the last one."""
        return step == 1 or self.intervals.due(self.intervals.logging_steps, step)

    def _learning_rates(self) -> dict[str, float]:
        """Of the next update: the model's, and in a step that is logged those of parts with their own."""
        found = {"train/lr": self.engine.learning_rate()}
        if self._line_is_due(self.step + 1):
            for part, highest in self._rates.items():
                found[f"train/lr_{part}"] = self.engine.learning_rate_of(highest)
        return found

    def _sent_bytes(self, seen: SeenStep | None) -> float:
        if not self._num_chunks:  # a step of a subclass's own
            return 0.0
        return self.engine.traffic.predict(
            num_chunks=self._num_chunks,
            kept_chunks=self.memory.graphs.number,
            gathered_values=0 if seen is None else seen.watched.gathered_values,
        )

    def _report(self, metrics: Mapping[str, float]) -> None:
        if self.tracker is None:
            return
        try:
            self.tracker.log(metrics, step=self.step)
        except VembedError as error:
            self._error = self._error or error
        if self._progress is not None and "train/loss" in metrics:
            shown = ("loss", "lr", "grad_norm", "samples_per_second")
            self._progress.set_postfix({n: f"{metrics[f'train/{n}']:.4g}" for n in shown})
        logger.info("%s", log_text(metrics, step=self.step, num_steps=self.intervals.num_steps))
