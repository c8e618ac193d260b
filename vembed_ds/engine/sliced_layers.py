"""Layers that are computed again in the backward pass, a slice of the batch at a time.

Chunks of the gradient cache pass through the whole model one after another. Here all slices of a
batch pass through one layer before any passes through the next, so a step needs a layer's parameters
twice, however many slices there are. Kept are the inputs of every layer, and what lies inside a
layer for one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

from vembed_ds.distributed.seeding import capture_rng, restore_rng

FAMILIES = frozenset(
    [
        "bert",
        "roberta",
        "xlm-roberta",
        "distilbert",
        "electra",
        "modernbert",
        "nomic_bert",
        "qwen2",
        "qwen3",
        "llama",
        "mistral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "vit",
        "deit",
        "dinov2",
        "siglip",
        "clip",
    ]
)
"""``model_type`` of backbones whose layers were compared in slices with whole ones."""


def slice_layers(backbone: nn.Module, *, size: int) -> None:
    """Let every layer of a backbone compute at most ``size`` items at once, in training.

    Before the engine is made: it learns here that ZeRO-3 gathers a layer's parameters together.

    Args:
        backbone: A Hugging Face model of :data:`FAMILIES`: its layers map hidden states
            ``[n, ...]`` to the same shape, each item for itself.
        size: Items of a slice.
    """
    for layer in backbone.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(_in_slices, layer, size)
            set_z3_leaf_module(layer, True)


class _Call(NamedTuple):
    """One call of a layer, for all items of a chunk.

    Attributes:
        run: The layer's forward pass, of hidden states ``[n, ...]`` and the arguments.
        arguments: Others by place and by name, of which nothing needs a gradient; tensors of n
            items are sliced as the hidden states are, others (``[1, ...]``, ``[tokens]``) are not.
        size: Items of a slice.
        trained: The layer's trained parameters.
    """

    run: Callable[..., Tensor]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    size: int
    trained: tuple[nn.Parameter, ...]

    def slices(self, number: int) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
        """Where every slice of so many items lies, and the layer's forward pass for it."""
        for start in range(0, number, self.size):
            place = slice(start, start + self.size)
            positional, named = tree_map_only(
                Tensor, partial(_sliced, place, number), self.arguments
            )

            def run(hidden: Tensor, positional: Any = positional, named: Any = named) -> Tensor:
                return self.run(hidden, *positional, **named)

            yield place, run


def _sliced(place: slice, number: int, value: Tensor) -> Tensor:
    return value[place] if value.dim() > 1 and len(value) == number else value


def _in_slices(
    layer: nn.Module, size: int, forward: partial[Tensor], hidden: Tensor, *positional: Any
) -> Tensor:
    """What transformers calls in the place of a layer's forward pass."""
    run, named = partial(forward.func, *forward.args), forward.keywords
    trained = tuple(p for p in layer.parameters() if p.requires_grad)
    call = _Call(run, (positional, named), size, trained)
    output: Tensor = _InSlices.apply(call, hidden, *trained)  # type: ignore[no-untyped-call]
    return output


class _InSlices(torch.autograd.Function):
    """Gives a layer's parameters their gradient once, summed over the slices."""

    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *trained: Tensor) -> Tensor:
        """The layer's output; the random state before it belongs to the call."""
        before = capture_rng(hidden.device)
        output = torch.empty_like(hidden)
        for place, run in call.slices(len(hidden)):
            output[place] = run(hidden[place])
        ctx.call = call
        ctx.state = None if capture_rng(hidden.device).equals(before) else before
        ctx.save_for_backward(hidden)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and of the parameters; these are summed in float32."""
        (hidden,) = ctx.saved_tensors
        after = capture_rng(hidden.device)
        if ctx.state is not None:
            restore_rng(ctx.state, hidden.device)
        below = torch.empty_like(hidden) if ctx.needs_input_grad[1] else None
        trained = ctx.call.trained
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        for place, run in ctx.call.slices(len(hidden)):
            piece = hidden[place].detach().requires_grad_(below is not None)
            with torch.enable_grad():
                output = run(piece)
            wanted = trained if below is None else (*trained, piece)
            found = torch.autograd.grad(output, wanted, gradient[place], materialize_grads=True)
            for sum_, part in zip(sums, found, strict=False):
                sum_.add_(part)
            if below is not None:
                below[place] = found[-1]
        if ctx.state is not None:
            restore_rng(after, hidden.device)
        return None, below, *(s.to(p.dtype) for s, p in zip(sums, trained, strict=True))
