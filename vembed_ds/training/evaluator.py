"""The loss on validation batches, over all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vembed_ds.data.batches import plan_step
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.distributed import comm
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import DataError
from vembed_ds.losses import LossFunction
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.steps.gradient_cache import embed_plan
from vembed_ds.tracking.trackers import Tracker
from vembed_ds.training.data_utils import TensorBatch
from vembed_ds.training.loss_inputs import loss_inputs
from vembed_ds.training.tensor_batches import ItemizedBatch, TensorItems, itemize

logger = logging.getLogger(__name__)


class Evaluator:
    """Computes the validation loss.

    Args:
        model: The model inside the engine.
        criterion: From :func:`build_loss`.
        engine: From :func:`prepare_engine`.
        retrieval_mode: What the roles hold.
        log_with: An open :class:`Tracker`, which gets ``val/loss``; or the name of one, which says
            nothing here: a :class:`Trainer` logs to its own, as ``eval/loss``.
        chunk_size: Items of each kind in one forward pass, or more where they are shorter than the
            longest; ``None``: the whole batch.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        *,
        criterion: LossFunction,
        engine: TrainEngine,
        retrieval_mode: str = "t2i",
        log_with: Tracker | str | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.model, self.criterion, self.engine = model, criterion, engine
        self.retrieval_mode, self.log_with, self.chunk_size = retrieval_mode, log_with, chunk_size
        self._items = TensorItems()

    def evaluate(self, val_dataloader: Iterable[TensorBatch], global_step: int = 0) -> float:
        """The mean loss of a validation pair, over all batches of all ranks. Collective.

        Args:
            val_dataloader: Batches of this rank: as many, and of as many pairs, as on the others.
            global_step: For the log.

        Returns:
            The same number on every rank.

        Raises:
            DataError: On every rank: there is no batch, or the ranks' batches differ in number or
                size.
        """
        total, pairs = torch.zeros((), device=self.engine.device), 0
        with self._evaluation_mode():
            for tensors in self._together(val_dataloader):
                batch = itemize(
                    tensors, retrieval_mode=self.retrieval_mode, streams=self.model.streams
                )
                size = len(batch.indices)
                total += comm.mean_over_ranks(self._loss(batch)) * size
                pairs += size
        if not pairs:
            raise DataError("val_dataloader has no batch; give validation data")
        average = float(total) / pairs
        if comm.is_main():
            logger.info("step %d: val/loss=%.6g", global_step, average)
            if isinstance(self.log_with, Tracker):
                self.log_with.log({"val/loss": average}, step=global_step)
        return average

    @torch.no_grad()
    def _loss(self, batch: ItemizedBatch) -> Tensor:
        self._items.remember(batch)
        streams = self.model.streams
        plan = plan_step(
            batch.roles,
            budget=ChunkBudget(self.chunk_size),
            streams=streams,
            filler=self._items.filler,
            merged=streams,  # evaluation draws no random numbers
        )
        rows = embed_plan(self.engine, plan, pad=self._items.pad)
        # Without items the model gives what the loss learns, whole under ZeRO-3 too.
        learned = {name: value.float() for name, value in self.engine.embed({}).items()}
        return self.criterion(loss_inputs(batch, rows, learned))

    def _together(self, loader: Iterable[TensorBatch]) -> Iterator[TensorBatch]:
        """This rank's batches, as long as every rank has one of the same size."""
        batches = iter(loader)
        while True:
            tensors = next(batches, None)
            size = -1 if tensors is None else _size(tensors)
            most, least = comm.all_max([size, -size])
            if most != -least:
                raise DataError(
                    f"val_dataloader: one rank has a batch of {max(-least, 0)} pairs where another "
                    f"has {most}; give every rank as many batches, all of one size"
                )
            if tensors is None:
                return
            yield tensors

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)


def _size(tensors: TensorBatch) -> int:
    """Number of queries: every mode gives their tokens or their pixels."""
    names = ("query_image_grid_thw", "query_pixel_values", "query_input_ids", "input_ids")
    return next((len(tensors[name]) for name in names if tensors.get(name) is not None), 0)
