"""What embeddings and loss take, counted by running the step's own code on a world that is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vembed_ds.data.batches import lay_out
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.planning.tracing import LiveBytes
from vembed_ds.steps.gradient_cache import BatchLoss, compute_gradient
from vembed_ds.streams import mask_name

RANKS = (8, 16)
"""Worlds that are counted; what larger ones take lies on the line through both."""
WHOLE = 2**22
"""Pairs times columns up to which a loss is run that compares all at once."""


@dataclass(frozen=True)
class LossMemory:
    """Bytes of a rank.

    Attributes:
        kept: Embeddings and their gradient, once the loss is differentiated.
        peak: The most until then, these included.
    """

    kept: int
    peak: int


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a rank's batch.

    Attributes:
        roles: For every role, the stream of its items and how many there are of each pair's.
        shapes: For every stream, the shape of an item's embedding: ``(D,)``, or ``(L, D)`` of tokens.
        learned: Shapes of what the loss learns, by name.
        dtype: Of the model's outputs.
    """

    roles: Mapping[str, tuple[str, float]]
    shapes: Mapping[str, tuple[int, ...]]
    learned: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype


def loss_memory(
    embedded: Embedded, loss: BatchLoss, *, batch_size: int, ranks: int, tile_size: int | None
) -> LossMemory:
    """What embeddings and loss of one rank take.

    Args:
        embedded: What is compared.
        loss: Of a batch of any number of pairs.
        batch_size: Pairs of a rank.
        ranks: Of the world.
        tile_size: Rows and columns that the loss compares at a time; ``None``: all.
    """

    def of_world(size: int) -> list[int]:
        if tile_size is not None:
            return _of_tiles(
                lambda pairs: _counted(embedded, loss, pairs, size), batch_size, tile_size
            )
        most = math.isqrt(WHOLE // size)
        sizes = [batch_size] if batch_size <= most else [most // 4, most // 2, most]
        return _continued(lambda pairs: _counted(embedded, loss, pairs, size), sizes, batch_size)

    worlds = [ranks] if ranks <= max(RANKS) else [*RANKS]
    return LossMemory(*_continued(of_world, worlds, ranks))


def _of_tiles(count: Callable[[int], list[int]], batch_size: int, tile_size: int) -> list[int]:
    """From two rows of tiles on, memory grows with the rows of the batch, and tiles no more."""
    whole = batch_size <= 2 * tile_size
    return _continued(count, [batch_size] if whole else [tile_size, 2 * tile_size], batch_size)


def _continued(count: Callable[[int], list[int]], places: Sequence[int], place: int) -> list[int]:
    """What is counted at some places, on the curve through all of them."""
    found = np.array([count(known) for known in places], dtype=np.float64)
    curves = (np.polyfit(places, column, len(places) - 1) for column in found.T)
    return [round(float(np.polyval(curve, place))) for curve in curves]


def _counted(embedded: Embedded, loss: BatchLoss, batch_size: int, ranks: int) -> list[int]:
    roles = {
        role: [EncodedItem(stream, {})] * round(batch_size * each)
        for role, (stream, each) in embedded.roles.items()
    }
    live = LiveBytes()
    engine = _Outputs(embedded)
    with comm.pretend(ranks), live:
        held = compute_gradient(
            engine,
            lay_out(roles, budget=ChunkBudget(items=None)).alone(),
            loss_function=loss,
            pad=lambda stream, items: {"items": torch.empty(len(items), 0)},
            trainable=lambda stream: False,
        )
    del held
    return [engine.kept_bytes, max(live.history)]


class _Outputs:
    """An engine whose model gives outputs out of nothing."""

    device = torch.device("cpu")

    def __init__(self, embedded: Embedded) -> None:
        self._embedded = embedded
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.kept_bytes = 0

    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        embedded, outputs = self._embedded, {}
        for stream, chunk in inputs.items():
            number, shape = len(chunk["items"]), embedded.shapes[stream]
            outputs[stream] = self._output((number, *shape))
            if len(shape) > 1:
                outputs[mask_name(stream)] = torch.ones(number, shape[0], dtype=torch.bool)
        for name, size in embedded.learned.items():
            outputs[name] = self._output(size)
        floating = [output for output in outputs.values() if output.is_floating_point()]
        self.kept_bytes += sum(output.nbytes + 4 * output.numel() for output in floating)
        return outputs

    def _output(self, shape: Sequence[int]) -> Tensor:
        with self._mode:
            return torch.empty(shape, dtype=self._embedded.dtype)

    def backward(self, surrogate: Tensor) -> None:
        raise AssertionError("nothing is trainable here")

    def reduce_once(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parameters_held(self) -> AbstractContextManager[None]:
        return nullcontext()
