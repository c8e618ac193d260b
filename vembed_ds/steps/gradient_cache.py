"""The step: embed every chunk, compute the loss on embeddings, replay with gradient.

Gradient caching (Gao et al. 2021, arXiv 2101.06983, section 3.2): ``dL/dw = sum_chunks
dE_c/dw . dL/dE_c``, so once ``dL/dE`` is known for all embeddings, the chunks can be
differentiated one at a time. The last chunk keeps the graph of its first pass: it is the first
to be differentiated, so nothing else needs its memory. A batch of one chunk is therefore the
standard step: one forward, one backward, the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vembed_ds.data.batches import StepPlan, collect_roles
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.distributed.seeding import RngState, capture_rng, restore_rng
from vembed_ds.similarity import Embeddings
from vembed_ds.streams import is_learned

Outputs = dict[str, Tensor]
PadFunction = Callable[[str, Sequence[EncodedItem]], dict[str, Tensor]]
BatchLoss = Callable[[Mapping[str, Embeddings], Mapping[str, Tensor]], Tensor]


class StepResult(NamedTuple):
    """What a step found out; detached, on the device, not synchronised.

    Attributes:
        loss: This rank's mean loss, scalar float32.
        learned: What the loss learns, by name, float32, before the update.
    """

    loss: Tensor
    learned: dict[str, Tensor]


class Embedder(Protocol):
    """What embeds chunks: the student's engine, or a teacher's."""

    @property
    def device(self) -> torch.device: ...  # noqa: D102
    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]: ...  # noqa: D102


class Engine(Embedder, Protocol):
    """What the step needs of an engine; see ``engine.train_engine.TrainEngine``."""

    def parameters_held(self) -> AbstractContextManager[None]: ...  # noqa: D102
    def backward(self, surrogate: Tensor) -> None: ...  # noqa: D102
    def reduce_once(self) -> AbstractContextManager[None]: ...  # noqa: D102


def compute_gradient(
    engine: Engine,
    plan: StepPlan,
    *,
    loss_function: BatchLoss,
    pad: PadFunction,
    trainable: Callable[[str], bool],
) -> StepResult:
    """Leave the gradient of the whole batch, reduced over ranks, in the engine.

    Collective: every rank calls it; under ZeRO-3 with plans of equal chunk counts. The random
    state afterwards is that after the embed phase, whatever the replay drew.

    Args:
        engine: Embeds, differentiates, reduces.
        plan: The rank's batch and its chunks.
        loss_function: From the embeddings of every role (float32) and what the loss learns
            (float32, by name) to this rank's loss; averaged over ranks it is the loss of the
            whole batch.
        pad: Pads the items of a chunk to one batch ``{argument: [n, ...]}``.
        trainable: Whether a stream's embeddings need a gradient; others are not replayed.
    """
    inputs = _ChunkInputs(plan, pad=pad, device=engine.device)
    with engine.parameters_held():
        outputs, states = _embed(engine, inputs)
        after_embed = capture_rng(engine.device)
        with phase(Kind.LOSS):
            loss, gradients = _differentiate_loss(plan, outputs, loss_function)
        with engine.reduce_once():
            _replay(engine, inputs, outputs[-1], gradients, states, trainable)
    restore_rng(after_embed, engine.device)
    return StepResult(loss, {name: v.detach().float() for name, v in _learned(outputs[-1]).items()})


def embed_plan(engine: Embedder, plan: StepPlan, *, pad: PadFunction) -> dict[str, Embeddings]:
    """The embeddings of every role, float32, without gradient.

    Collective under ZeRO-3; arguments as in :func:`compute_gradient`.
    """
    inputs = _ChunkInputs(plan, pad=pad, device=engine.device)
    with torch.no_grad():
        outputs = [engine.embed(inputs.get(index)) for index in range(len(inputs))]
    widened = [
        {name: v.float() if v.is_floating_point() else v for name, v in chunk.items()}
        for chunk in outputs
    ]
    return collect_roles(plan, widened)


class _ChunkInputs:
    """Padded inputs of chunk i, made when they are needed and not kept."""

    def __init__(self, plan: StepPlan, *, pad: PadFunction, device: torch.device) -> None:
        self._plan, self._pad, self._device = plan, pad, device

    def __len__(self) -> int:
        return len(self._plan.chunks)

    def get(
        self, index: int, *, only: Callable[[str], bool] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        return {
            stream: {
                key: value.to(self._device, non_blocking=True)
                for key, value in self._pad(stream, self._plan.streams[stream][places]).items()
            }
            for stream, places in self._plan.chunks[index].items()
            if only is None or only(stream)
        }


def _embed(engine: Engine, inputs: _ChunkInputs) -> tuple[list[Outputs], list[RngState]]:
    """Every chunk's outputs; all but the last without graph, their random state recorded."""
    outputs, states = [], []
    last = len(inputs) - 1
    for index in range(len(inputs)):
        states.append(capture_rng(engine.device))
        words = f"embedding chunk {index + 1} of {len(inputs)}"
        with phase(Kind.EMBEDDING, words), torch.set_grad_enabled(index == last):
            outputs.append(engine.embed(inputs.get(index)))
    return outputs, states


def _differentiate_loss(
    plan: StepPlan, outputs: list[Outputs], loss_function: BatchLoss
) -> tuple[Tensor, list[Outputs]]:
    """The loss, and its gradient with respect to every chunk's outputs, in float32."""
    leaves = [{name: _leaf(value) for name, value in chunk.items()} for chunk in outputs]
    with torch.enable_grad():
        loss = loss_function(collect_roles(plan, leaves), _learned(leaves[-1]))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [
        {name: leaf.grad for name, leaf in chunk.items() if leaf.grad is not None}
        for chunk in leaves
    ]
    return loss.detach(), gradients


def _leaf(output: Tensor) -> Tensor:
    """An output as the start of the loss's graph; masks pass as they are."""
    if not output.is_floating_point():
        return output
    return output.detach().float().requires_grad_()


def _learned(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: output for name, output in outputs.items() if is_learned(name)}


def _replay(
    engine: Engine,
    inputs: _ChunkInputs,
    kept: Outputs,
    gradients: list[Outputs],
    states: list[RngState],
    trainable: Callable[[str], bool],
) -> None:
    """Differentiate the kept chunk, then recompute and differentiate the others."""
    if any(output.requires_grad for output in kept.values()):
        with phase(Kind.REPLAY, "differentiating the last chunk"):
            engine.backward(_surrogate(kept, gradients[-1]))
    for index in range(len(inputs) - 1):
        # What is not trained is not computed again; frozen towers draw no random numbers, so
        # the others still see the state they saw in the embed phase.
        chunk = inputs.get(index, only=trainable)
        if chunk:
            restore_rng(states[index], engine.device)
            with phase(Kind.REPLAY, f"replaying chunk {index + 1} of {len(inputs)}"):
                engine.backward(_surrogate(engine.embed(chunk), gradients[index]))


def _surrogate(outputs: Outputs, gradients: Outputs) -> Tensor:
    """A scalar whose gradient with respect to ``outputs`` is ``gradients``."""
    terms = [
        (output.float() * gradients[name]).sum()
        for name, output in outputs.items()
        if name in gradients and output.requires_grad
    ]
    return torch.stack(terms).sum()
