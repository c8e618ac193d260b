"""What a rank of a test world runs: trainings in which memory runs out at chosen places."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.distributed.train_cases import run_train
from tests.parity.cases import whole_parameters
from vembed_ds.data.collators import Batch
from vembed_ds.distributed import comm, phases
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.steps.gradient_cache import StepResult
from vembed_ds.steps.meters import HostMeter
from vembed_ds.training.loop import TrainingLoop

_EMBED, _BACKWARD = TrainEngine.embed, TrainEngine.backward
_COMPUTE, _TRAIN = TrainingLoop.compute_gradient, TrainingLoop.train


def run_short(*, faults: Sequence[Sequence[Any]], **run: Any) -> dict[str, Any]:
    """A training that has no memory at some places, each once.

    Args:
        faults: ``(ranks, method, words)``: which ranks, in ``embed`` or in the middle of
            ``backward``, and how the phase is named.
        run: As of :func:`run_train`.

    Returns:
        As :func:`run_train`; ``sizes`` of the chunks that each step was made with in the end,
        ``graphs`` kept in it, ``after``, ``left`` faults that did not happen, ``partial``: how many
        gradients were there when a backward pass broke off, ``depth``: in how many backward passes
        DeepSpeed thinks it is, and the ``log``.
    """
    left = [list(fault) for fault in faults if comm.rank() in fault[0]]
    partial: list[int] = []

    def is_here(method: str) -> bool:
        here = str(phases.current())
        found = next((f for f in left if f[1] == method and here.startswith(f[2])), None)
        if found is not None:
            left.remove(found)
        return found is not None

    def embed(self: TrainEngine, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        outputs = _EMBED(self, inputs)
        if is_here("embed"):
            _fail()
        return outputs

    def backward(self: TrainEngine, surrogate: Tensor) -> None:
        if not is_here("backward"):
            return _BACKWARD(self, surrogate)
        trained = [p for p in self.module.parameters() if p.requires_grad]

        def fail(grad: Tensor) -> None:
            partial.append(sum(p.grad is not None for p in trained))
            _fail()

        names = dict(self.module.named_parameters())  # the first layer is reached last
        deepest = next(p for name, p in names.items() if name.endswith("token_embedding.weight"))
        hook = deepest.register_hook(fail)
        try:
            return _BACKWARD(self, surrogate)
        finally:
            hook.remove()

    with (
        mock.patch.object(TrainEngine, "embed", embed),
        mock.patch.object(TrainEngine, "backward", backward),
    ):
        return {**_recorded(**run), "left": left, "partial": partial}


def run_in_sizes(*, sizes: Mapping[int, int], **run: Any) -> dict[str, Any]:
    """A training without any fault that is told the chunk size of each of its steps."""

    def compute(self: TrainingLoop, batch: Batch) -> StepResult:
        self.budget = replace(self.budget, items=sizes[self.step + 1])
        return _COMPUTE(self, batch)

    with mock.patch.object(TrainingLoop, "compute_gradient", compute):
        return _recorded(**run)


def run_with_room(*, graphs: Sequence[int], **run: Any) -> dict[str, Any]:
    """A training that finds, on each rank, room for so many graphs."""
    room = graphs[comm.rank()] - 1
    with (
        mock.patch.object(HostMeter, "weigh", lambda self, forward: (forward(), 100)),
        mock.patch.object(HostMeter, "spare", return_value=100 * room),
        mock.patch.object(TrainEngine, "bytes_beside_graphs", 0),
    ):
        return _recorded(**run)


def _recorded(**run: Any) -> dict[str, Any]:
    sizes: dict[int, int | None] = {}
    graphs: dict[int, int] = {}
    after: dict[str, Tensor] = {}
    depth: list[int] = []
    compute = TrainingLoop.compute_gradient

    def compute_and_note(self: TrainingLoop, batch: Batch) -> StepResult:
        result = compute(self, batch)
        sizes[self.step + 1] = self.budget.items
        graphs[self.step + 1] = self.memory.graphs.number
        return result

    def train_and_note(self: TrainingLoop) -> dict[str, float]:
        metrics = _TRAIN(self)
        after.update(whole_parameters(self.engine))
        depth.append(getattr(self.engine.engine.optimizer, "_backward_active_depth", 0))
        return metrics

    with (
        mock.patch.object(TrainingLoop, "compute_gradient", compute_and_note),
        mock.patch.object(TrainingLoop, "train", train_and_note),
        _listening() as log,
    ):
        answer = run_train(**run)
    return {**answer, "sizes": sizes, "graphs": graphs, "after": after, "depth": depth, "log": log}


def always_short(*, rank: int, **run: Any) -> dict[str, Any]:
    """A training of which one rank cannot embed the first chunk, however small."""

    def embed(self: TrainEngine, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if comm.rank() == rank and str(phases.current()).startswith("step 1: embedding chunk 1 "):
            _fail()
        return _EMBED(self, inputs)

    with mock.patch.object(TrainEngine, "embed", embed), _listening() as log:
        return {**run_train(**run), "log": log}


def _fail() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """The warnings of our loggers."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vembed_ds")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
