"""Which parameters an embedding depends on at all, and which no step of a run comes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vembed_ds.models.embedding_model import EmbeddingModel

UNREACHED = "vembed_unreached"
IDLE = "vembed_idle"


def mark_unreached(model: EmbeddingModel, inputs: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Mark the trainable parameters that no embedding depends on: heads nothing reads.

    Their gradient is zero for ever, so plain PyTorch (gradient ``None``) leaves them alone; weight
    decay would shrink them. They are kept from decaying rather than frozen, because one item may
    also miss what another reaches (an expert of a mixture).

    Args:
        model: On the host, in float32.
        inputs: A padded item of every stream.

    Returns:
        Their names.
    """
    training = model.training
    with torch.enable_grad():
        outputs = model.eval()(inputs)
    model.train(training)
    reached = _leaves(outputs.values())
    names = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in reached:
            setattr(parameter, UNREACHED, True)
            names.append(name)
    return names


def is_unreached(parameter: nn.Parameter) -> bool:
    """Whether :func:`mark_unreached` marked it."""
    return bool(getattr(parameter, UNREACHED, False))


def mark_idle(modules: Iterable[nn.Module]) -> None:
    """Mark the parameters of modules through which no step passes, so that none gathers them."""
    for parameter in (p for module in modules for p in module.parameters()):
        setattr(parameter, IDLE, True)


def is_idle(parameter: nn.Parameter) -> bool:
    """Whether :func:`mark_idle` marked it."""
    return bool(getattr(parameter, IDLE, False))


def _leaves(outputs: Iterable[Tensor]) -> set[Tensor]:
    """Every leaf of the graphs behind ``outputs``."""
    found: set[Tensor] = set()
    seen: set[object] = set()
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return found
