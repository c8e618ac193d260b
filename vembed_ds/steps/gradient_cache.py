"""The step: embed every chunk, compute the loss on embeddings, replay with gradient.

Gradient caching (Gao et al. 2021, arXiv 2101.06983, section 3.2): ``dL/dw = sum_chunks
dE_c/dw . dL/dE_c``, so once ``dL/dE`` is known for all embeddings, the chunks can be
differentiated one at a time, from the last to the first. The last ones may keep the graph of their
first pass (:mod:`vembed_ds.steps.kept_graphs`) and are then not computed again; the very last one
always does, because nothing else needs its memory before it is differentiated. A batch of one chunk
is therefore the standard step, and so is any batch whose graphs are all kept: one forward, one
backward, the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vembed_ds.data.batches import StepPlan, collect_roles
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.distributed.seeding import (
    RngState,
    capture_rng,
    restore_rng,
)
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.kept_graphs import KeptGraphs
from vembed_ds.steps.shortage import Agree, may_run_out
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
    graphs: KeptGraphs | None = None,
    agree: Agree | None = None,
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
        graphs: How many chunks keep their graph; ``None``: the last one.
        agree: Called before the loss and before the reduction, with what ran out of memory on
            this rank since; ``None``: that ends this rank's step as any other error does.

    Raises:
        MemoryShortage: From ``agree``: nothing was reduced, and what was computed is gone.
    """
    graphs = graphs or KeptGraphs()
    chunks = _Chunks(engine, plan, pad=pad, device=engine.device)
    with graphs.step(plan) as number, engine.parameters_held():
        with may_run_out(agree):
            embedded = _embed(engine, chunks, graphs, first_kept=len(chunks) - number)
        outputs = [chunk.outputs for chunk in embedded]
        with phase(Kind.LOSS):
            loss, gradients = _differentiate_loss(plan, outputs, loss_function)
        learned = {name: v.detach().float() for name, v in _learned(outputs[-1]).items()}
        del outputs  # the replay frees every graph as soon as it is differentiated
        with engine.reduce_once(), may_run_out(agree):
            _replay(engine, chunks, embedded, gradients, graphs, trainable)
    return StepResult(loss, learned)


def embed_plan(engine: Embedder, plan: StepPlan, *, pad: PadFunction) -> dict[str, Embeddings]:
    """The embeddings of every role, float32, without gradient.

    Collective under ZeRO-3; arguments as in :func:`compute_gradient`.
    """
    chunks = _Chunks(engine, plan, pad=pad, device=engine.device)
    with torch.no_grad():
        outputs = [chunks.embed(index) for index in range(len(chunks))]
    widened = [
        {name: v.float() if v.is_floating_point() else v for name, v in chunk.items()}
        for chunk in outputs
    ]
    return collect_roles(plan, widened)


class _Chunks:
    """The chunks of a step; their inputs are padded when they are needed and not kept."""

    def __init__(
        self, engine: Embedder, plan: StepPlan, *, pad: PadFunction, device: torch.device
    ) -> None:
        self._engine, self._plan, self._pad, self._device = engine, plan, pad, device

    def __len__(self) -> int:
        return len(self._plan.chunks)

    def has(self, index: int, only: Callable[[str], bool]) -> bool:
        """Whether a chunk has a stream of this kind."""
        return any(only(stream) for stream in self._plan.chunks[index])

    def embed(self, index: int, *, only: Callable[[str], bool] | None = None) -> Outputs:
        """A forward pass of a chunk, or of those of its streams."""
        inputs = {
            stream: {
                key: value.to(self._device, non_blocking=True)
                for key, value in self._pad(stream, self._plan.streams[stream][places]).items()
            }
            for stream, places in self._plan.chunks[index].items()
            if only is None or only(stream)
        }
        return self._engine.embed(inputs)


class _Embedded(NamedTuple):
    """A chunk that was embedded.

    Attributes:
        outputs: Of the model.
        has_graph: Whether they can be differentiated as they are.
        state: The random state before it; ``None``: it has drawn nothing.
    """

    outputs: Outputs
    has_graph: bool
    state: RngState | None


def _embed(
    engine: Engine, chunks: _Chunks, graphs: KeptGraphs, *, first_kept: int
) -> list[_Embedded]:
    """Embed every chunk, those from ``first_kept`` on with graph."""
    embedded = []
    before = capture_rng(engine.device)
    for index in range(len(chunks)):
        has_graph = index >= first_kept
        with phase(Kind.EMBEDDING, f"embedding chunk {index + 1} of {len(chunks)}"):
            if has_graph:
                outputs = graphs.forward(partial(chunks.embed, index))
            else:
                with torch.no_grad():
                    outputs = chunks.embed(index)
        after = capture_rng(engine.device)
        embedded.append(_Embedded(outputs, has_graph, None if after.equals(before) else before))
        before = after
    return embedded


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
    chunks: _Chunks,
    embedded: list[_Embedded],
    gradients: list[Outputs],
    graphs: KeptGraphs,
    trainable: Callable[[str], bool],
) -> None:
    """Differentiate the chunks from the last to the first; compute again what has no graph.

    Uses ``embedded`` up, also when it fails: what is left there holds its memory.
    """
    after_embed, has_drawn = capture_rng(engine.device), False
    try:
        while embedded:
            outputs, has_graph, state = embedded.pop()
            index = len(embedded)
            of = f"chunk {index + 1} of {len(chunks)}"
            if has_graph:
                if any(output.requires_grad for output in outputs.values()):
                    with phase(Kind.REPLAY, f"differentiating {of}"):
                        engine.backward(_surrogate(outputs, gradients[index]))
            # What is not trained is not computed again; frozen towers draw no random numbers, so
            # the others still see the state they saw in the embed phase.
            elif chunks.has(index, trainable):
                if state is not None:
                    restore_rng(state, engine.device)
                    has_drawn = True
                with phase(Kind.REPLAY, f"replaying {of}"):
                    outputs = graphs.forward(partial(chunks.embed, index, only=trainable))
                    engine.backward(_surrogate(outputs, gradients[index]))
    finally:
        embedded.clear()
    if has_drawn:
        restore_rng(after_embed, engine.device)


def _surrogate(outputs: Outputs, gradients: Outputs) -> Tensor:
    """A scalar whose gradient with respect to ``outputs`` is ``gradients``."""
    terms = [
        (output.float() * gradients[name]).sum()
        for name, output in outputs.items()
        if name in gradients and output.requires_grad
    ]
    return torch.stack(terms).sum()
