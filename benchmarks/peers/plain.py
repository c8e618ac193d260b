"""Plain PyTorch in one process: the whole graph, activation checkpointing, a gradient cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.meter import Meter
from benchmarks.peers.encoder import Inputs, contrastive, load_encoder
from benchmarks.peers.job import Job

Batch = dict[str, dict[str, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[Batch], Tensor]  # leaves the gradient in the model; this rank's loss


def train(job: Job, meter: Meter) -> None:
    """Options: ``checkpointing``, ``cached``."""
    encoder = load_encoder(job)
    if job.options.get("checkpointing"):
        encoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    loss_function = loss_of(job)

    def whole(batch: Batch) -> Tensor:
        loss = loss_function(encoder(**batch["query"]), encoder(**batch["positive"]))
        loss.backward()
        return loss.detach()

    def cached(batch: Batch) -> Tensor:
        return cached_gradient(encoder, batch, chunk=job.task.chunk, loss_function=loss_function)

    drive(job, meter, encoder, cached if job.options.get("cached") else whole)


def loss_of(job: Job, **distributed: Any) -> Loss:
    """The job's loss; ``distributed`` as of :func:`contrastive`."""
    return partial(
        contrastive,
        temperature=job.task.temperature,
        symmetric=job.symmetric,
        **distributed,
    )


def drive(job: Job, meter: Meter, model: nn.Module, gradient: Gradient) -> None:
    """Train ``model`` with torch's AdamW on the job's batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.task.lr, weight_decay=0.0)
    batch = job.batch()
    meter.watch(model)
    model.train()
    for _ in range(meter.steps):
        with meter.step():
            loss = gradient(batch)
            norm = gradient_norm(trained)
            optimizer.step()
            optimizer.zero_grad()
        meter.tell(loss, norm)


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Of the whole gradient, also where each rank has a part of it; then collective."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    full = getattr(norm, "full_tensor", None)
    return norm if full is None else full()


def cached_gradient(
    encoder: Callable[..., Tensor],
    batch: Batch,
    *,
    chunk: int,
    loss_function: Loss,
    backward: Callable[[Tensor, bool], None] = lambda surrogate, last: surrogate.backward(),
) -> Tensor:
    """Gradient caching as in its paper (arXiv 2101.06983), the least of it.

    Args:
        encoder: From the arguments of a chunk to unit vectors.
        batch: Of this rank.
        chunk: Items of a forward pass.
        loss_function: Of all queries and positives.
        backward: Of one chunk; is told whether it is the last.

    Returns:
        The loss.
    """
    chunks = [(role, part) for role, inputs in batch.items() for part in cut(inputs, chunk)]
    states, rows = [], []
    for _, part in chunks:
        states.append(_random_state())
        with torch.no_grad():
            rows.append(encoder(**part).requires_grad_())
    by_role = {
        role: [r for (name, _), r in zip(chunks, rows, strict=True) if name == role]
        for role in batch
    }
    loss = loss_function(torch.cat(by_role["query"]), torch.cat(by_role["positive"]))
    loss.backward()
    after = _random_state()
    for number, (_, part) in enumerate(chunks):
        _restore(states[number])
        again = encoder(**part)
        if again.requires_grad:  # not of a frozen tower
            backward((again * rows[number].grad).sum(), number == len(chunks) - 1)
    _restore(after)
    return loss.detach()


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def _restore(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1:])


def cut(inputs: Inputs, size: int) -> list[dict[str, Tensor]]:
    """Items of a role, ``size`` at a time."""
    count = len(next(iter(inputs.values())))
    return [
        {name: values[start : start + size] for name, values in inputs.items()}
        for start in range(0, count, size)
    ]
