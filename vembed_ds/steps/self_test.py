"""The start-up self-test: does chunking change the gradient of the real model on real data?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vembed_ds.data.batches import FillerFunction, plan_step
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.distributed.seeding import capture_rng, restore_rng
from vembed_ds.errors import GradientError
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import BatchLoss, Engine, PadFunction, compute_gradient

# Largest relative difference of the two gradients. fp32 was seen to differ by 1e-6 to 1e-5, 16 bit
# by what its rounding gives. Lost chunks, stale buffers and statistics over a chunk differ by
# 30 % or more; a model that looks at its padding (ConvBERT) by as little as 0.1 %. A fault that
# both chunkings share, such as ranks that do not reduce at all, is for the parity tests to find.
TOLERANCES = {"fp32": 2e-4, "fp16": 0.05, "bf16": 0.15}


class TestableEngine(Engine, Protocol):
    """An engine whose reduced gradient can be read and thrown away."""

    loss_scale: float

    @property
    def module(self) -> nn.Module: ...  # noqa: D102
    def full_gradients(self) -> Iterator[Tensor]: ...  # noqa: D102
    def discard_gradients(self) -> None: ...  # noqa: D102


def check_gradient(
    engine: TestableEngine,
    roles: Mapping[str, Sequence[EncodedItem]],
    *,
    loss_function: BatchLoss,
    pad: PadFunction,
    streams: Sequence[str],
    trainable: Callable[[str], bool],
    filler: FillerFunction,
    tolerance: float,
) -> float:
    """Compare the reduced gradient of one-item chunks with that of one chunk.

    To the loss a term is added that pulls every embedding in a direction of its own. The loss
    alone may have no gradient worth comparing: equal positives, a collapsed model.

    Dropout is off for the comparison, and in fp16 the loss scale is low enough that nothing
    overflows. Weights, gradients, loss scale and random state are afterwards as they were. Cost: a few passes over a tiny batch, and one float32 copy of the gradient on the
    hosts, shared between the ranks. Collective.

    Args:
        engine: The engine of the run.
        roles: A few items of this rank per role.
        loss_function: As in :func:`compute_gradient`.
        pad: As in :func:`compute_gradient`.
        streams: The model's streams.
        trainable: As in :func:`compute_gradient`.
        filler: Gives a valid item of a stream, for ranks without one.
        tolerance: Largest relative difference.

    Returns:
        ``|g_many - g_one| / |g_one|``.

    Raises:
        GradientError: On every rank, with both norms, when they differ by more.
    """
    before = capture_rng(engine.device)

    def gradients(chunk_size: int | None) -> Iterator[Tensor]:
        # Equal items are embedded each, and one by one: what a row depends on must show.
        budget = ChunkBudget(chunk_size, tokens=None)
        plan = plan_step(roles, budget=budget, streams=streams, filler=filler)
        compute_gradient(
            engine,
            plan,
            loss_function=lambda rows, learned: loss_function(rows, learned) + _pull(rows),
            pad=pad,
            trainable=trainable,
        )
        # The whole tensors pass by one at a time; every rank keeps a share of each.
        for grad in engine.full_gradients():
            yield grad.flatten()[comm.rank() :: comm.world_size()].cpu()
        engine.discard_gradients()

    def norms() -> Tensor:
        """``[3]``: of the one-chunk gradient, the many-chunk one, their difference."""
        one = list(gradients(None))
        squares = torch.zeros(3, dtype=torch.float64)
        for whole, many in zip(one, gradients(1), strict=True):
            parts = (whole, many, many - whole)
            squares += torch.stack([part.double().square().sum() for part in parts])
        return (comm.mean_over_ranks(squares) * comm.world_size()).sqrt()

    with (
        _without_dropout(engine.module),
        _same_loss_scale_after(engine),
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),
    ):
        found = norms()
        while not found.isfinite().all() and engine.loss_scale > 1:
            # fp16 starts at a scale that overflows and finds a lower one by skipping steps.
            engine.loss_scale = max(1.0, engine.loss_scale / 4)
            found = norms()
    restore_rng(before, engine.device)
    return _judge(*found.tolist(), tolerance=tolerance)


def _pull(rows: Mapping[str, Embeddings]) -> Tensor:
    """A linear function of all embeddings, whose gradient is as large as a loss's."""
    terms: list[Tensor] = []
    for number, role in enumerate(sorted(rows)):
        values = rows[role].values
        if not len(values):
            continue
        generator = torch.Generator().manual_seed(number)  # the same for every chunking
        directions = torch.randn(values.shape, generator=generator).to(values.device)
        size = values.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)
        mask = rows[role].mask
        pulled = values * directions / size
        terms.append((pulled if mask is None else pulled * mask.unsqueeze(-1)).mean())
    return torch.stack(terms).sum()


def _judge(norm_one: float, norm_many: float, difference: float, *, tolerance: float) -> float:
    relative = difference / norm_one if norm_one else difference
    if not math.isfinite(relative) or relative > tolerance:
        raise GradientError(
            f"gradient self-test: one chunk gives gradient norm {norm_one:.6g}, one-item chunks "
            f"give {norm_many:.6g}; the gradients differ by {relative:.3%} (allowed {tolerance:.2%}). "
            "Training would follow a wrong gradient. Something in the model depends on which "
            "items share a chunk (statistics, or padding that is not masked), or this DeepSpeed "
            "version reduces differently; choose another backbone, or report model and versions "
            "(gradient_self_test: false skips the test, not the fault)"
        )
    return relative


@contextmanager
def _same_loss_scale_after(engine: TestableEngine) -> Iterator[None]:
    scale = engine.loss_scale
    try:
        yield
    finally:
        if engine.loss_scale != scale:
            engine.loss_scale = scale


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but with activation checkpointing as in training.

    Layers recompute only while they are in training mode, so those stay in it and lose the
    dropout probabilities they hold themselves.
    """
    changed: list[tuple[nn.Module, str, Any]] = []
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():  # LeViT keeps what it computes here, and its graph is spent after once
        model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and modes[module]:
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    changed.append((module, name, value))
    for module, name, _ in changed:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
        for module, mode in modes.items():
            module.training = mode
