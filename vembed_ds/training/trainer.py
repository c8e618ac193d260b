"""vembed-factory's low-level trainer, on an engine: the same step, over batches of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vembed_ds.checkpointing.names import checkpoint_name, checkpoints
from vembed_ds.config.distillation import teacher_entries
from vembed_ds.config.schema import Config, RunConfig, TrainingConfig, default_of
from vembed_ds.data.chunking import AUTO
from vembed_ds.data.collators import Batch
from vembed_ds.distributed import comm
from vembed_ds.engine.replicas import ReplicaCheck
from vembed_ds.engine.teacher_engine import TeacherEngine
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import CheckpointError, ConfigError
from vembed_ds.losses import LossFunction, with_distillation
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.steps.gradient_cache import StepResult
from vembed_ds.tracking.trackers import Tracker, build_tracker
from vembed_ds.training.checkpoint import save_checkpoint
from vembed_ds.training.config import as_config
from vembed_ds.training.data_utils import TensorBatch
from vembed_ds.training.drawing import examine_draws
from vembed_ds.training.engine_setup import chunk_budget
from vembed_ds.training.evaluator import Evaluator
from vembed_ds.training.loop import Intervals, TrainingLoop
from vembed_ds.training.loss_setup import build_distillation
from vembed_ds.training.memory_setup import step_memory
from vembed_ds.training.nonfinite import step_guard
from vembed_ds.training.teacher_loading import teacher_ds_config
from vembed_ds.training.teacher_sources import NO_TEACHERS, SameInputs, Teachers
from vembed_ds.training.tensor_batches import ItemizedBatch, TensorItems, itemize

__all__ = ["Trainer"]


class Trainer(TrainingLoop):
    """Trains on batches of padded tensors, and lets a subclass change the step.

    Every batch goes through the step of ``vembed_ds.train``, with or without gradient cache, so
    the update is that of one process on the batches of all ranks.

    Args:
        model: The model inside the engine.
        optimizer: That the engine was made with; the engine's own steps.
        dataloader: This rank's batches of one epoch, with the keys of
            :mod:`vembed_ds.training.data_utils`; as many, of one size, on every rank.
        criterion: From :func:`build_loss`.
        engine: From :func:`prepare_engine`.
        config: A configuration, or a plain mapping; its ``processor``, if any, is saved.
        scheduler: That the engine was made with.
        teacher_model: From :func:`build_teacher_model`; it is held in shards, and embeds the inputs
            that the student gets, so it must take the same. How it is followed, the configuration's
            ``distillation_*`` say. ``None``: the configuration has no teacher.
        distillation_loss_fn: Only ``None``: ``distillation_loss_type`` names the loss.
        evaluator: Computes the loss on ``val_dataloader``; ``None``: one is made.
        val_dataloader: Validation batches; ``None``: no evaluation.

    Raises:
        ConfigError: A teacher of another make, or another than is configured; a distillation loss
            of one's own; or a schedule that the engine does not have.
        CheckpointError: ``output_dir`` holds checkpoints of an earlier run.
    """

    how_to_go_on = "load_checkpoint(path, engine), and train into another output_dir"

    def __init__(
        self,
        model: EmbeddingModel,
        *,
        optimizer: Optimizer,
        dataloader: Any,
        criterion: LossFunction,
        engine: TrainEngine,
        config: Config | Mapping[str, Any],
        scheduler: LRScheduler | None = None,
        teacher_model: Any = None,
        distillation_loss_fn: Any = None,
        evaluator: Evaluator | None = None,
        val_dataloader: Iterable[TensorBatch] | None = None,
    ) -> None:
        if distillation_loss_fn is not None:
            raise ConfigError(
                "distillation_loss_fn: a function of one rank's embeddings is not the loss of the "
                "whole batch; leave it out and choose by distillation_loss_type"
            )
        if scheduler is not None and engine.engine.lr_scheduler is None:
            raise ConfigError(
                "scheduler: the engine has none and would keep the rate; give it to prepare_engine"
            )
        self.config, self.dataloader, self.optimizer = as_config(config), dataloader, optimizer
        self.retrieval_mode = self.config.data.retrieval_mode
        self.evaluator = evaluator
        training = self.config.training
        items = TensorItems()
        _check_teacher(teacher_model, model, self.config)
        _check_saving(self.config.run)
        _check_training(training)
        intervals = _intervals(self.config, steps_per_epoch=len(dataloader))
        task, teachers = criterion, NO_TEACHERS
        if teacher_model is not None:
            teachers = _teachers(teacher_model, self.config)
            criterion = _followed(criterion, self.config, num_steps=intervals.num_steps)
        super().__init__(
            engine=engine,
            model=model,
            loader=_items_of(dataloader, self._itemized, num_steps=intervals.num_steps),
            processor=items,
            loss_functions=[criterion],
            budget=chunk_budget(training),
            intervals=intervals,
            tracker=comm.run_together(
                lambda: _open_output(self.config),
                doing=f"output_dir={self.config.run.output_dir!r}",
            ),
            save=functools.partial(_save, model, engine, config.get("processor"), self.config),
            guard=step_guard(self.config, engine, Path(self.config.run.output_dir)),
            replicas=ReplicaCheck(engine, every=training.replica_check_steps),
            evaluate=None if val_dataloader is None else lambda: self._val_loss(val_dataloader),
            pin_memory=self.config.data.pin_memory,
            teachers=teachers,
            memory=step_memory(self.config, engine),
        )
        self._items, self._criterion = items, task
        self._result: StepResult | None = None
        self._undecided = training.encode_duplicates_once

    def compute_gradient(self, batch: Batch) -> StepResult:
        """The step's gradient, by the method that a subclass may have replaced."""
        assert isinstance(batch, ItemizedBatch)
        self._result = None
        cached = self.config.training.use_gradient_cache
        step = self._step_with_gradient_cache if cached else self._step_standard
        loss = torch.as_tensor(step(batch.tensors), device=self.engine.device)
        learned: dict[str, Tensor] = {} if self._result is None else self._result.learned
        return StepResult(loss, learned)

    def _step_standard(self, batch: TensorBatch) -> Tensor:
        """Leave the gradient of a batch in the engine, which steps afterwards. Collective.

        A replacement calls this one, or runs ``engine.backward`` inside ``engine.reduce_once()``.

        Args:
            batch: As the loader gave it.

        Returns:
            This rank's loss, scalar, detached.
        """
        return self._run_step(batch)

    def _step_with_gradient_cache(self, batch: TensorBatch) -> Tensor:
        """As :meth:`_step_standard`, in chunks of ``gradient_cache_chunk_size``. Collective."""
        return self._run_step(batch)

    def _run_step(self, tensors: TensorBatch) -> Tensor:
        batch = self._itemized(tensors)
        self._items.remember(batch)
        if (
            self._undecided
        ):  # whether equal items may share a row; what they are like shows only now
            examine_draws(self, self._items.seen, merge=True)
            self._undecided = False
        self._result = super().compute_gradient(batch)
        return self._result.loss

    def _itemized(self, tensors: TensorBatch) -> ItemizedBatch:
        return itemize(tensors, retrieval_mode=self.retrieval_mode, streams=self.model.streams)

    def _val_loss(self, batches: Iterable[TensorBatch]) -> dict[str, float]:
        if self.evaluator is None:
            self.evaluator = Evaluator(
                self.model,
                criterion=self._criterion,
                engine=self.engine,
                retrieval_mode=self.retrieval_mode,
                chunk_size=self.budget.items,
            )
        return {"loss": self.evaluator.evaluate(batches, global_step=self.step)}


def _check_teacher(model: Any, student: EmbeddingModel, config: Config) -> None:
    """Refuse a teacher that would be skipped, or not followed as the configuration says."""
    entries = teacher_entries(config.distillation)
    if model is None and entries:
        raise ConfigError(
            f"teacher_model=None: the configuration has a teacher, {entries[0].name!r}; pass "
            "build_teacher_model(config), or remove it from the configuration"
        )
    if model is None:
        return
    if not isinstance(model, EmbeddingModel):
        raise ConfigError(
            f"teacher_model: {type(model).__name__} is no EmbeddingModel; make it by "
            "build_teacher_model"
        )
    if len(entries) != 1 or entries[0].model_name is None:
        raise ConfigError(
            "teacher_model: the configuration must name one teacher; set teacher_model_name"
        )
    if missing := sorted(set(student.parts) - set(model.parts)):
        raise ConfigError(
            f"teacher_model: embeds {' and '.join(model.parts)} only, and is given the student's "
            f"{' and '.join(missing)} too; choose a teacher that embeds both"
        )
    unread = {
        key: value
        for key in ("query_instruction", "document_instruction")
        if (value := getattr(entries[0], key)) is not None
    }
    if entries[0].mode != "live":
        unread["mode"] = entries[0].mode
    if unread:
        raise ConfigError(
            [
                f"teacher_{key}={value!r}: here the teacher is live, and gets the student's own "
                f"tensors; remove teacher_{key}, or train by vembed_ds.train"
                for key, value in unread.items()
            ]
        )


def _teachers(model: EmbeddingModel, config: Config) -> Teachers:
    """The teacher in shards. Collective."""
    (entry,) = teacher_entries(config.distillation)
    ds_config = teacher_ds_config(entry, precision=config.distillation.teacher_precision)
    engine = TeacherEngine(model.requires_grad_(False), ds_config=ds_config)
    return Teachers({0: SameInputs(engine)}, widths={})


def _followed(criterion: LossFunction, config: Config, *, num_steps: int) -> LossFunction:
    """The task beside the distillation that is configured."""
    distillation = build_distillation(config.loss, config.distillation, num_steps=num_steps)
    assert distillation is not None
    if distillation.loss_type == "regression":
        raise ConfigError(
            "distillation_loss_type=regression: its projection would have to be in the model before "
            "the engine is made; choose kl, mse, margin_mse or rank"
        )
    return with_distillation(criterion, distillation, tile_size=config.training.loss_tile_size)


def _intervals(config: Config, *, steps_per_epoch: int) -> Intervals:
    """As in vembed-factory, every epoch is evaluated and saved, unless other steps are given."""
    if not steps_per_epoch:
        raise ConfigError("dataloader: has no batch; give training data")
    run = config.run
    return Intervals(
        num_steps=config.training.max_steps or config.training.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        logging_steps=run.logging_steps,
        eval_steps=run.eval_steps or steps_per_epoch,
        save_steps=run.save_steps or (0 if run.save_epochs else steps_per_epoch),
        save_epochs=run.save_epochs,
        save_minutes=run.save_every_minutes,
        eval_on_start=run.eval_on_start,
    )


def _items_of(
    dataloader: Any, itemized: Callable[[TensorBatch], ItemizedBatch], *, num_steps: int
) -> Iterator[ItemizedBatch]:
    """The batches of all epochs; a sampler that shuffles by epoch is told which one it is."""
    step = epoch = 0
    while step < num_steps:
        sampler: Any = getattr(dataloader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        for tensors in dataloader:
            if step == num_steps:
                return
            yield itemized(tensors)
            step += 1
        epoch += 1


def _open_output(config: Config) -> Tracker | None:
    """The trackers, which begin anew; on rank 0 only.

    Raises:
        CheckpointError: An earlier run's checkpoints are in the way of this run's.
    """
    if not comm.is_main():
        return None
    if there := checkpoints(Path(config.run.output_dir)):
        raise CheckpointError(
            f"{min(there)}: an earlier run's checkpoint, and the class Trainer overwrites none; give "
            "another output_dir, or move it away"
        )
    return build_tracker(
        config.run.report_to,
        folder=config.run.output_dir,
        run_name=config.run.run_name,
        config=config.model_dump(mode="json"),
    )


def _save(
    model: EmbeddingModel, engine: TrainEngine, processor: Any, config: Config, step: int
) -> Path:
    folder = Path(config.run.output_dir) / checkpoint_name(step)
    return save_checkpoint(folder, model, engine, processor=processor, config=config)


def _check_training(training: TrainingConfig) -> None:
    if training.use_torch_compile:
        raise ConfigError(
            "use_torch_compile=True: the class Trainer gets batches that are padded already, to any length, "
            "and compiles nothing; remove it, or train with the command vembed_ds.train"
        )
    if training.use_gradient_cache and training.gradient_cache_chunk_size == AUTO:
        raise ConfigError(
            "gradient_cache_chunk_size='auto': the class Trainer cannot choose, because it meets items only in "
            "batches; give a number, or train with the command vembed_ds.train"
        )


def _check_saving(run: RunConfig) -> None:
    """Keys that vembed_ds.train alone follows: they would be ignored here."""
    keys = ("save_total_limit", "best_metric", "save_async", "on_save_error", "node_local_output")
    for key in keys:
        value = getattr(run, key)
        if value != default_of(key):
            raise ConfigError(
                f"{key}={value!r}: the class Trainer writes model folders and follows it not; "
                "remove it, or train with the command vembed_ds.train"
            )
