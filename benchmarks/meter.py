"""What is measured while a peer trains, in the peer's own process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import memory, reset_peak
from benchmarks.models import PAD
from benchmarks.traffic import CountedTraffic, loopback_bytes
from vembed_ds.distributed import comm


class Meter:
    """Measures the steps of one rank.

    The peer encloses each of ``steps`` steps in :meth:`step`, or calls :meth:`begin` and
    :meth:`end`, and tells what it found out. The first ``warm_up`` steps are not in the figures.

    Args:
        steps: How many the peer takes.
        warm_up: Of them, those that come first.
        counts: Whether collectives and encoder rows are counted (which costs time): collectives of
            the second step, rows of the first.
    """

    def __init__(self, *, steps: int, warm_up: int, counts: bool) -> None:
        self.steps, self._warm_up, self._counts = steps, warm_up, counts
        self._at_start = reset_peak()
        self._before = 0
        self._wire: int | None = None
        self._step = ExitStack()
        self._times: list[tuple[float, float]] = []  # wall and CPU seconds of every step
        self._told: list[tuple[float, float]] = []  # loss and gradient norm of every step
        self._sent: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._peak: dict[str, float] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step."""
        self.begin()
        yield
        self.end()

    def begin(self) -> None:
        """A step begins; every rank calls it."""
        number = len(self._times)
        if number == self._warm_up:
            self._begin_figures()
        if self._counts and number == 1:
            traffic = self._step.enter_context(CountedTraffic())
            self._step.callback(lambda: self._sent.update(traffic.sent))
        _synchronize()
        self._started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """The step is over, gradients dropped; every rank calls it."""
        _synchronize()
        wall, cpu = self._started
        self._times.append((time.perf_counter() - wall, time.process_time() - cpu))
        self._step.close()
        if len(self._times) == self.steps:
            self._end_figures()

    def tell(self, loss: Tensor | float, norm: Tensor | float) -> None:
        """What the peer found of a step.

        Args:
            loss: Of this rank or of all; its mean over the ranks is the loss of the global batch.
            norm: Of the whole gradient.
        """
        self._told.append((float(loss), float(norm)))

    def watch(self, model: nn.Module) -> None:
        """Count what a model's first layers see while gradients are on: every item once.

        A step with gradient cache embeds without gradients what it will embed again.
        """
        if not self._counts:
            return
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and "position" not in name and "type" not in name:
                module.register_forward_pre_hook(self._count_tokens)
            elif isinstance(module, nn.Conv2d | nn.Conv3d):
                module.register_forward_pre_hook(self._count_pictures)

    def found(self) -> dict[str, Any]:
        """Everything, for :mod:`benchmarks.comparing`."""
        timed = self._times[self._warm_up :]
        return {
            "losses": [loss for loss, _ in self._told],
            "norms": [norm for _, norm in self._told],
            "seconds": [wall for wall, _ in timed],
            "cpu_seconds": [cpu for _, cpu in timed],
            "sent": dict(self._sent),
            "wire_bytes": self._wire,
            "rows": dict(self._rows),
            **self._peak,
        }

    def _begin_figures(self) -> None:
        comm.barrier()
        self._before = reset_peak()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._wire = loopback_bytes()
        comm.barrier()

    def _end_figures(self) -> None:
        comm.barrier()
        if self._wire is not None:
            self._wire = (loopback_bytes() or 0) - self._wire
        comm.barrier()
        most = memory("VmHWM")
        self._peak = {
            "peak_mb": (most - self._before) / 1024,
            "whole_mb": (most - self._at_start) / 1024,
        }
        if torch.cuda.is_initialized():
            self._peak["gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20

    def _count_tokens(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and not self._times:
            (ids,) = arguments
            self._rows["rows"] += len(ids)
            self._rows["tokens"] += ids.numel()
            self._rows["real_tokens"] += int((ids != PAD).sum())

    def _count_pictures(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and not self._times:
            self._rows["rows"] += len(arguments[0])


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
