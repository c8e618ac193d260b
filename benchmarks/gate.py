"""The gate: who computes another gradient gets no figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from benchmarks.peers.encoder import contrastive, load
from benchmarks.peers.job import CPU, Setting
from benchmarks.peers.plain import cached_gradient, cut, gradient_norm
from benchmarks.task import EXACT, Task, read_tensors

STEPS = 2  # the loss of the second tells of the direction of the first update


class Expected(NamedTuple):
    """What everybody has to find.

    Attributes:
        losses: Of the first two steps.
        norm: Of the first gradient.
    """

    losses: tuple[float, float]
    norm: float


class Verdict(NamedTuple):
    """What the gate says of a variant.

    Attributes:
        right: Whether it gets figures.
        loss: Of the first step, over all ranks.
        norm: Of the first gradient, on the rank that is farthest off.
        error: The largest relative difference among first loss and norms.
        later_error: Of the second loss.
    """

    right: bool
    loss: float
    norm: float
    error: float
    later_error: float


def judge(
    ranks: Sequence[Mapping[str, Any]], expected: Expected, setting: Setting = CPU
) -> Verdict:
    """Compare what the ranks told with what is right.

    Args:
        ranks: Of every rank, ``losses`` (whose mean over the ranks is the global batch's) and
            ``norms`` (each of the whole gradient), by step.
        expected: From :func:`reference`.
        setting: Has the tolerances.
    """
    loss, later = (mean(rank["losses"][step] for rank in ranks) for step in range(STEPS))
    norm = max((rank["norms"][0] for rank in ranks), key=lambda n: _error(n, expected.norm))
    error = max(_error(loss, expected.losses[0]), _error(norm, expected.norm))
    later_error = _error(later, expected.losses[1])
    right = error <= setting.tolerance and later_error <= setting.later_tolerance
    return Verdict(right, loss, norm, error, later_error)


def reference(
    task: Task, folder: Path, symmetric: bool, frozen_text: bool, device: str
) -> Expected:
    """Two steps in plain PyTorch, one process, no code of any framework; in float64 on a CPU.

    Embedded in chunks, for memory's sake; the table's first row is the whole graph in float32.
    """
    encoder = load(folder / EXACT, frozen_text=frozen_text, setting=Setting(device)).train()
    dtype = torch.float64 if device == "cpu" else torch.float32
    encoder.to(dtype)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.lr, weight_decay=0.0)
    batch = {
        role: {
            name: t.to(device, dtype if t.is_floating_point() else t.dtype)
            for name, t in inputs.items()
        }
        for role, inputs in read_tensors(folder).items()
    }
    loss_function = partial(contrastive, temperature=task.temperature, symmetric=symmetric)
    first = cached_gradient(encoder, batch, chunk=task.chunk, loss_function=loss_function)
    norm = gradient_norm(trained)
    optimizer.step()
    with torch.no_grad():
        rows = {
            role: torch.cat([encoder(**part) for part in cut(inputs, task.chunk)])
            for role, inputs in batch.items()
        }
    second = loss_function(rows["query"], rows["positive"])
    return Expected((float(first), float(second)), float(norm))


def _error(found: float, expected: float) -> float:
    error = abs(found / expected - 1)
    return error if math.isfinite(error) else math.inf
