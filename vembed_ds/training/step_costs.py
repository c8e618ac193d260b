"""From the configuration to what a step of its model takes, without weights, ranks or accelerator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vembed_ds.config.distillation import DistillationConfig
from vembed_ds.config.schema import Config, LossConfig
from vembed_ds.data.collators import Batch
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.losses import LossFunction
from vembed_ds.losses.similarities import tile_size_of
from vembed_ds.models.builder import ModelSpec
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.hollow import outline_backbone
from vembed_ds.models.rates import set_rates
from vembed_ds.models.reach import mark_idle, mark_unreached
from vembed_ds.planning.activations import ChunkCosts, ChunkMemory, passes_of
from vembed_ds.planning.loss import Embedded, LossMemory, loss_memory
from vembed_ds.planning.memory import Cut, Peak, peak_of
from vembed_ds.planning.parameters import size_of
from vembed_ds.planning.states import Setting, states_of
from vembed_ds.planning.tracing import Inputs, inputs_without_contents, without_contents
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import BatchLoss
from vembed_ds.streams import FEATURES, IMAGE_INPUTS, JOINT, is_learned
from vembed_ds.training.frozen_features import stored_parts
from vembed_ds.training.loss_inputs import loss_inputs
from vembed_ds.training.loss_setup import build_losses
from vembed_ds.training.model_setup import own_rates, setup_model
from vembed_ds.training.step_items import StepItems

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepCosts:
    """What a step of a run takes of a rank's memory.

    Args:
        config: Of the run.
        spec: The model's shape.
        losses: Of every data set.
        items: What the batch is made of.
        fused: Whether to count as on an accelerator.

    Raises:
        ConfigError: The model cannot be built.

    Attributes:
        size: Of the model.
        items: Of a rank and step, by stream.
    """

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        losses: Sequence[LossConfig],
        items: StepItems,
        *,
        fused: bool,
    ) -> None:
        self._config, self._losses, self._of, self._fused = config, losses, items, fused
        self._model = _outline(config, spec, items)
        stored = stored_parts(self._model, config, items.processor, used=items.parts)
        for part in stored:
            mark_idle(self._model.encoder.backbone_modules(part))
        without_contents(self._model, dtype=DTYPES[config.model.precision])
        set_rates(self._model, own_rates(config.optimizer))
        self.items = items.count(config.training.batch_size)
        self._features: dict[str, int] = {}  # by kind of item, the width of what is stored of it
        known = items.processor.stored  # then the items hold their features themselves
        with passes_of(self._model):
            self._features = {
                part: self._feature_width(part) for part in stored if part not in known
            }
            mark_unreached(self._model, self._few())
            self._embedded = self._embed()
        self.size = size_of(
            self._model,
            weight_decay=config.optimizer.weight_decay,
            load_in_4bit=config.model.load_in_4bit,
        )
        self._chunks: dict[tuple[bool, bool], ChunkCosts] = {}
        self._loss_memory: dict[int, LossMemory] = {}

    @property
    def width(self) -> int:
        """Dimensions of an embedding; of all layers, where several are embedded."""
        return next(iter(self._embedded.shapes.values()))[-1]

    @property
    def largest(self) -> int:
        """Items of the largest stream, of a rank and step."""
        return max(self.items.values())

    @property
    def gathered_values(self) -> int:
        """Numbers of a rank's embeddings that become columns of the loss."""
        directions = {direction for own in self._losses for direction in own.loss_directions}
        symmetric = any(own.loss_bidirectional for own in self._losses)
        queries = symmetric or any(direction.endswith("_query") for direction in directions)
        return round(
            self._config.training.batch_size
            * sum(
                number * math.prod(self._embedded.shapes[stream])
                for role, streams in self._of.per_pair.items()
                for stream, number in streams.items()
                if queries or role != "query"
            )
        )

    def num_chunks(self, chunk_size: int) -> int:
        """Chunks of a rank and step, if all items are as long as the longest."""
        return -(-self.largest // chunk_size)

    def kept_graphs(self, chunk_size: int) -> int:
        """As configured; 1 where that is ``auto``, which keeps more where memory is left."""
        kept = self._config.training.gradient_cache_kept_graphs
        return 1 if kept == "auto" else min(kept, self.num_chunks(chunk_size))

    def chunk(self, chunk_size: int | None, *, checkpointing: bool) -> ChunkMemory:
        """What a chunk takes.

        Args:
            chunk_size: Items of each stream; ``None``: the whole batch.
            checkpointing: Whether activations are computed again.

        Raises:
            ConfigError: The model's layers cannot be computed again.
        """
        largest = self.largest
        whole = chunk_size is None or chunk_size >= largest
        if len(set(self.items.values())) == 1:  # then a whole batch is a chunk like any other
            chunk_size, whole = largest if whole else chunk_size, False
        inputs = self._whole_batch if whole else self._chunk
        with _recomputing(self._model, checkpointing):
            costs = self._chunks.setdefault(
                (whole, checkpointing), ChunkCosts(self._model, inputs, fused=self._fused)
            )
            return costs.of(largest if chunk_size is None or whole else chunk_size)

    def peak(self, setting: Setting, *, chunk_size: int, checkpointing: bool) -> Peak:
        """The most that a rank holds on its device in a step.

        It keeps as many graphs as :meth:`kept_graphs`.

        Args:
            setting: Of the model's state.
            chunk_size: Items of each stream per chunk.
            checkpointing: Whether activations are computed again.

        Raises:
            ConfigError: The model's layers cannot be computed again.
        """
        return peak_of(
            states_of(self.size, setting),
            Cut(
                chunks=self.num_chunks(chunk_size),
                kept=self.kept_graphs(chunk_size),
                chunk=self.chunk(chunk_size, checkpointing=checkpointing),
            ),
            self.loss(setting.ranks),
            precision=setting.precision,
            per_chunk=setting.reduction == "per_chunk",
        )

    def loss(self, ranks: int) -> LossMemory:
        """What embeddings and the hungriest of the losses take."""
        if ranks not in self._loss_memory:
            found = [self._memory_of(own, ranks) for own in self._losses]
            self._loss_memory[ranks] = max(found, key=lambda memory: memory.peak)
        return self._loss_memory[ranks]

    def _memory_of(self, loss: LossConfig, ranks: int) -> LossMemory:
        tile_size = self._config.training.loss_tile_size
        if tile_size == "auto":
            tile_size = tile_size_of(torch.device("cuda" if self._fused else "cpu"))
        (function,) = build_losses([loss], DistillationConfig(), num_steps=1, tile_size=tile_size)
        return loss_memory(
            self._embedded,
            self._batch_loss(function),
            batch_size=self._config.training.batch_size,
            ranks=ranks,
            tile_size=tile_size,
        )

    def _chunk(self, items: int) -> Inputs:
        return {stream: self._pad(stream, items) for stream in self.items}

    def _whole_batch(self, items: int) -> Inputs:
        """So many items of the largest stream, and of the others their share."""
        return {
            stream: self._pad(stream, max(1, round(items * number / self.largest)))
            for stream, number in self.items.items()
        }

    def _pad(self, stream: str, number: int) -> dict[str, Tensor]:
        padded = self._of.pad(stream, number)
        for part in self._features.keys() & ({"text", "image"} if stream == JOINT else {stream}):
            replaced = IMAGE_INPUTS & set(padded) if part == "image" else set(padded) - IMAGE_INPUTS
            padded = {name: value for name, value in padded.items() if name not in replaced}
            padded[FEATURES[part]] = torch.empty(number, self._features[part])
        return padded

    def _feature_width(self, part: str) -> int:
        stream = next(s for s in self.items if s in (part, JOINT))
        inputs = inputs_without_contents(self._model, self._pad(stream, 2))
        only = {n: v for n, v in inputs.items() if (n in IMAGE_INPUTS) == (part == "image")}
        with torch.no_grad():
            return int(self._model.encoder.features(part, only).shape[-1])

    def _few(self) -> Inputs:
        """Two items of every stream, for a pass of the model."""
        return {
            stream: inputs_without_contents(self._model, self._pad(stream, 2))
            for stream in self.items
        }

    def _embed(self) -> Embedded:
        with torch.no_grad():
            outputs = self._model(self._few())
        return Embedded(
            roles={
                role: (max(streams, key=lambda s: streams[s]), sum(streams.values()))
                for role, streams in self._of.per_pair.items()
            },
            shapes={stream: tuple(outputs[stream].shape[1:]) for stream in self.items},
            learned={n: tuple(v.shape) for n, v in outputs.items() if is_learned(n)},
            dtype=DTYPES[self._config.model.precision],
        )

    def _batch_loss(self, function: LossFunction) -> BatchLoss:
        def loss(rows: Mapping[str, Embeddings], learned: Mapping[str, Tensor]) -> Tensor:
            return function(loss_inputs(_batch_of(rows, self._of), rows, learned))

        return loss


def _outline(config: Config, spec: ModelSpec, items: StepItems) -> EmbeddingModel:
    """The model on placeholders; of layers in 4 bit the shapes are the same without."""
    plain = config.model.model_copy(update={"load_in_4bit": False})
    return setup_model(
        config.model_copy(update={"model": plain}),
        replace(spec, projection_files={}, adapters={}),
        used=items.parts,
        zero_stage=0,
        load=outline_backbone,
    ).train()


@contextmanager
def _recomputing(model: EmbeddingModel, wanted: bool) -> Iterator[None]:
    """With activation checkpointing inside, or without; both of its mechanisms keep as much."""
    backbones = model.trained_backbones() if wanted else []
    for backbone in backbones:
        enable_activation_checkpointing(backbone, mechanism="huggingface")
    try:
        yield
    finally:
        for backbone in backbones:
            backbone._set_gradient_checkpointing(enable=False)  # type: ignore[operator]


def _batch_of(rows: Mapping[str, Embeddings], items: StepItems) -> Batch:
    """Records of other contents each, as far as a loss may look at them."""
    number = len(rows["query"])
    negatives = None
    if "negative" in rows:
        ends = np.linspace(0, len(rows["negative"]), number + 1).astype(int)
        negatives = np.diff(ends).tolist()
    return Batch(
        indices=list(range(number)),
        keys={role: list(range(len(found))) for role, found in rows.items()},
        negative_counts=negatives,
        labels=list(range(number)) if items.labels else None,
        scores=[float(place) for place in range(number)] if items.scores else None,
    )
