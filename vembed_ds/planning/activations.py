"""What a chunk takes in its forward and its backward pass, as a function of its items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import nn

from vembed_ds.errors import ConfigError, one_line
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.planning.tracing import Inputs, Trace, inputs_without_contents, trace

Array = npt.NDArray[np.float64]
TRACED = (16, 32)
"""Items of the chunks that are traced; what others take lies on the line through both."""


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes that a chunk takes beside parameters and their gradients.

    Attributes:
        saved: What its graph keeps between the forward and the backward pass.
        forward_peak: The most in its forward pass.
        peak: The most in a forward and backward pass; what is summed to gradients in place counts
            while it is not.
        first_peak: The same where no gradient was there before, and those that come count.
    """

    saved: int
    forward_peak: int
    peak: int
    first_peak: int


class ChunkCosts:
    """Memory of chunks of a model without contents (:func:`tracing.without_contents`).

    Args:
        model: In training mode, with activation checkpointing or without.
        inputs: Of a chunk of so many items of every stream.
        fused: Whether to count as on an accelerator.

    Raises:
        ConfigError: What the model computes depends on values, which are not there.
    """

    def __init__(
        self, model: EmbeddingModel, inputs: Callable[[int], Inputs], *, fused: bool
    ) -> None:
        self._model, self._inputs, self._fused = model, inputs, fused

    def of(self, items: int) -> ChunkMemory:
        """What a chunk of ``items`` of every stream takes."""
        alive = self._history.alive(items)
        forward = alive[: self._history.forward_operations]
        return ChunkMemory(
            saved=int(forward[-1]),
            forward_peak=int(forward.max()),
            peak=int(self._history.summed(items).max()),
            first_peak=int(alive.max()),
        )

    @cached_property
    def _history(self) -> _History:
        with passes_of(self._model):
            small, large = (self._traced(number) for number in TRACED)
        return _History(small, large)

    def _traced(self, items: int) -> Trace:
        return trace(self._model, lambda: self._made(items), fused=self._fused)

    def _made(self, items: int) -> Inputs:
        return {
            stream: inputs_without_contents(self._model, chunk)
            for stream, chunk in self._inputs(items).items()
        }


@contextmanager
def passes_of(model: nn.Module) -> Iterator[None]:
    """Refuse, inside, a model that does not compute without contents.

    Raises:
        ConfigError: Its way depends on values, as that of experts does, or it needs a kernel that takes
            no tensor without contents.
    """
    try:
        yield
    except RuntimeError as error:  # of torch; those of tensors without contents are of its kind
        raise ConfigError(
            f"{_names(model)}: cannot be computed without the items' values ({one_line(error)}), so that its "
            "memory cannot be planned, nor gradient_cache_chunk_size be auto"
        ) from error


class _History:
    """Bytes alive after each operation of a chunk of any size, on the line through two traces.

    A model that goes over its images one by one makes as many operations more; of these only what is kept
    and the peaks of the two passes are compared.
    """

    def __init__(self, small: Trace, large: Trace) -> None:
        if len(small.alive) != len(large.alive):
            small, large = _summary(small), _summary(large)
        self._traces = (small, large)
        self.forward_operations = small.forward_operations

    def alive(self, items: int) -> Array:
        """Gradients that are complete count."""
        small, large = self._traces
        return _line(small.alive, large.alive, items)

    def summed(self, items: int) -> Array:
        """They do not."""
        small, large = self._traces
        return _line(small.summed, large.summed, items)


def _line(small: Sequence[int], large: Sequence[int], items: int) -> Array:
    first, second = (np.array(values, dtype=np.float64) for values in (small, large))
    return first + (second - first) * (items - TRACED[0]) / (TRACED[1] - TRACED[0])


def _summary(trace: Trace) -> Trace:
    number = trace.forward_operations
    alive, summed = (
        [max(values[:number]), values[number - 1], max(values[number:], default=0)]
        for values in (trace.alive, trace.summed)
    )
    return Trace(alive, summed, forward_operations=2)


def _names(model: nn.Module) -> str:
    backbones = model.trained_backbones() if isinstance(model, EmbeddingModel) else [model]
    return " and ".join(type(backbone).__name__ for backbone in backbones)
