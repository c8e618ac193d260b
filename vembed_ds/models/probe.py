"""What a backbone gives, found by running it once: neither a config nor a list of families can say.

A forward pass over a tiny input on the host, without gradient.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vembed_ds.errors import ConfigError, one_line
from vembed_ds.models.pooling import pool, token_states

OUTLINE = "is_outline"
"""Attribute of a backbone that will never have weights; only the first layers of it are run."""
# Two texts that differ in their last token only.
_IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])


@dataclass(frozen=True)
class Probe:
    """The outputs of a backbone for a tiny input.

    Attributes:
        backbone: Its class name, for messages.
        outputs: A Hugging Face output.
        attention_mask: ``[2, 4]`` of the two texts; ``None`` for an image.
    """

    backbone: str
    outputs: Any
    attention_mask: Tensor | None

    @property
    def has_pooler(self) -> bool:
        """Whether the output has a pooled part."""
        return getattr(self.outputs, "pooler_output", None) is not None

    @property
    def has_tokens(self) -> bool:
        """Whether the states are a sequence ``[n, L, D]``, not a map ``[n, D, H, W]``."""
        states = getattr(self.outputs, "last_hidden_state", None)
        return states is not None and states.dim() == 3

    @property
    def first_sees_last(self) -> bool:
        """Of two texts: whether changing the last token changed the first state."""
        first = self.outputs.last_hidden_state[:, 0].float()
        return float((first[0] - first[1]).norm()) > 1e-5 * float(first[0].norm())

    def own_pooler(self, pooling: str) -> str | None:
        """The backbone's own pooled output, which some readers prefer, beside that of ``pooling``.

        Returns:
            ``same``: equal to it; ``vector`` or ``map`` (of one place): another; none: it has none.
        """
        if not self.has_pooler:
            return None
        own = self.outputs.pooler_output
        if pooling not in ("pooler", "none"):
            pooled = pool(self.outputs, self.attention_mask, method=pooling)
            if torch.equal(pooled, own):
                return "same"
        return "vector" if own.dim() == 2 else "map"

    def pooled_width(self, pooling: str) -> int:
        """Width of the pooled output.

        Raises:
            ConfigError: The backbone has no output that can be pooled so.
        """
        try:
            if pooling == "none":
                return int(token_states(self.outputs, self.attention_mask)[0].shape[-1])
            return int(pool(self.outputs, self.attention_mask, method=pooling).shape[1])
        except (ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise ConfigError(f"{self.backbone}: cannot be pooled: {one_line(error)}") from error


def probe_text(backbone: nn.Module) -> Probe:
    """Embed two texts of four tokens.

    Raises:
        ConfigError: The backbone does not run on token ids alone.
    """
    size = getattr(backbone.config, "vocab_size", None)
    if not isinstance(size, int):
        raise ConfigError(
            f"{type(backbone).__name__}: its config states no vocab_size; not supported as text "
            "encoder"
        )
    ids = _IDS % size
    mask = torch.ones_like(ids)
    return Probe(
        type(backbone).__name__,
        _run(backbone, "text", input_ids=ids, attention_mask=mask),
        mask,
    )


def probe_image(backbone: nn.Module) -> Probe:
    """Embed one blank image: of the size that the config states, or of 2 x 3 patches (NaFlex).

    Raises:
        ConfigError: The backbone does not run on an image's pixels, or patches.
    """
    return Probe(type(backbone).__name__, _run(backbone, "image", **_blank_image(backbone)), None)


def _blank_image(backbone: nn.Module) -> dict[str, Tensor]:
    config: Any = backbone.config
    if "spatial_shapes" in inspect.signature(backbone.forward).parameters:
        width = config.num_channels * config.patch_size**2
        return {
            "pixel_values": torch.zeros(1, 6, width),
            "pixel_attention_mask": torch.ones(1, 6, dtype=torch.long),
            "spatial_shapes": torch.tensor([[2, 3]]),
        }
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width)}


@contextmanager
def _first_layers(backbone: nn.Module) -> Iterator[None]:
    """With one layer of every stack of equal ones inside: as good for a probe, and soon computed."""
    stacks = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    whole = {stack: stack._modules for stack in stacks if len(set(map(_shapes, stack))) == 1}
    for stack, layers in whole.items():
        stack._modules = dict(itertools.islice(layers.items(), 1))
    try:
        yield
    finally:
        for stack, layers in whole.items():
            stack._modules = layers


def _shapes(layer: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, parameter.shape) for name, parameter in layer.named_parameters())


def _run(backbone: nn.Module, kind: str, **inputs: Tensor) -> Any:
    modes = {module: module.training for module in backbone.modules()}
    few = _first_layers(backbone) if hasattr(backbone, OUTLINE) else nullcontext()
    try:
        with torch.no_grad(), few:
            return backbone.eval()(**inputs)
    except Exception as error:  # whatever a model raises for inputs that it is not made for
        raise ConfigError(
            f"{type(backbone).__name__}: does not embed {kind}s by itself ({one_line(error)}); "
            f"not supported as {kind} encoder"
        ) from error
    finally:
        backbone.train()  # LeViT keeps its biases from evaluation until then, whatever is loaded
        for module, mode in modes.items():
            module.training = mode
