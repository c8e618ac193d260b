"""How many parameters a model has, by part, trained and frozen, and how they are grouped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TwoTowerEncoder
from vembed_ds.models.quantized import whole_shape
from vembed_ds.models.reach import is_idle

# NF4 with double quantisation: 4 bits a value, 8 bits for 64 values, 32 bits for 256 times as many.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Part:
    """A part of the model.

    Attributes:
        name: For people.
        trained: Number of values that are trained.
        frozen: Number of those that are not.
    """

    name: str
    trained: int
    frozen: int


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides how much of it a rank holds.

    Attributes:
        parts: Of all parameters; each is in one.
        groups: Numbers of values of every trained parameter, by group of the optimizer.
        frozen: Numbers of values of every frozen parameter that is held in the model's precision.
        idle: Of those of them that no pass of a step needs.
        quantized: Number of values that are held in 4 bit.
        buffer_bytes: Of all buffers.
    """

    parts: tuple[Part, ...]
    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]
    idle: tuple[int, ...]
    quantized: int
    buffer_bytes: int

    @property
    def trained(self) -> int:
        """Number of trained values."""
        return sum(map(sum, self.groups))

    @property
    def largest(self) -> int:
        """Number of values of the largest trained parameter."""
        return max(map(max, self.groups))

    @property
    def total(self) -> int:
        """Number of values, trained or not."""
        return self.trained + sum(self.frozen) + self.quantized

    def kept_whole(self, limit: int) -> int:
        """Number of values of the parameters that have at most ``limit``, which stage 3 never cuts."""
        return sum(number for number in self._every if number <= limit)

    def used(self, limit: int) -> int:
        """Number of values of the others, as far as a pass needs them."""
        needed = sum(number for number in self._every if number > limit)
        return needed - sum(number for number in self.idle if number > limit)

    @property
    def _every(self) -> list[int]:
        return [*(number for group in self.groups for number in group), *self.frozen]


def size_of(model: EmbeddingModel, *, weight_decay: float, load_in_4bit: bool) -> ModelSize:
    """Count a model's parameters.

    Args:
        model: Complete: frozen, with adapters, marked (``models/reach.py``, ``models/rates.py``).
        weight_decay: Of the matrices; decides the groups.
        load_in_4bit: The weights of adapted layers will be held in 4 bit, or are already.
    """
    groups = build_param_groups(model, weight_decay=weight_decay)
    packed = set(_base_weights(model)) if load_in_4bit else set()
    frozen = [p for p in model.parameters() if not p.requires_grad and p not in packed]
    return ModelSize(
        parts=tuple(_parts(model)),
        groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
        frozen=tuple(p.numel() for p in frozen),
        idle=tuple(p.numel() for p in frozen if is_idle(p)),
        quantized=sum(map(_values, packed)),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )


def _base_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights under adapters."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight  # type: ignore[union-attr]
            assert isinstance(weight, nn.Parameter)
            yield weight


def _parts(model: EmbeddingModel) -> Iterator[Part]:
    counted: set[nn.Parameter] = set()
    for name, modules in _named_parts(model):
        found = {p for module in modules for p in module.parameters()} - counted
        counted |= found
        if found:
            trained = sum(p.numel() for p in found if p.requires_grad)
            yield Part(name, trained, sum(map(_values, found)) - trained)


def _values(parameter: nn.Parameter) -> int:
    """Also of a parameter that is held in 4 bit already, two values in a byte."""
    return math.prod(whole_shape(parameter) or parameter.shape)


def _named_parts(model: EmbeddingModel) -> Iterator[tuple[str, list[nn.Module]]]:
    encoder = model.encoder
    for part in encoder.parts:
        yield f"{part} tower", encoder.backbone_modules(part)
    if isinstance(encoder, TwoTowerEncoder):
        heads = [encoder.projection]
    else:
        heads = [encoder.tower(name).projection for name in encoder.towers]
    yield "projection", [head for head in heads if head is not None]
    yield "the rest", [model]
