"""Activation checkpointing, by the Hugging Face or the DeepSpeed mechanism."""

from __future__ import annotations

import functools

import deepspeed
from torch import nn
from torch.utils.checkpoint import checkpoint

from vembed_ds.engine.communication import join_deepspeed
from vembed_ds.engine.sliced_layers import FAMILIES, slice_layers
from vembed_ds.errors import ConfigError


def enable_activation_checkpointing(
    backbone: nn.Module, *, mechanism: str, slice_size: int | None = None
) -> None:
    """Recompute the backbone's layers in the backward pass instead of keeping activations.

    Both mechanisms go through the hook that transformers gives every layer, so they compose
    with the gradient cache and every ZeRO stage in the same way; they differ in who stores.

    Args:
        backbone: A Hugging Face model.
        mechanism: ``huggingface``: ``torch.utils.checkpoint``, non-reentrant; the default,
            because it also works when no input of a layer needs a gradient (first layer behind
            a frozen embedding). ``deepspeed``: ``deepspeed.checkpointing``, re-entrant.
        slice_size: Items that a layer computes at once, by a mechanism of our own
            (:mod:`vembed_ds.engine.sliced_layers`); ``None``: all of a chunk.

    Raises:
        ConfigError: The backbone has no layers that can be recomputed, or none that can be sliced.
    """
    if slice_size is not None:
        _require_sliceable(backbone, slice_size)
        slice_layers(backbone, size=slice_size)
        return
    if mechanism == "huggingface":
        recompute = functools.partial(checkpoint, use_reentrant=False)
    else:
        join_deepspeed()  # `configure` asks DeepSpeed for the rank
        deepspeed.checkpointing.configure(None)
        recompute = deepspeed.checkpointing.checkpoint
    if not getattr(backbone, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"gradient_checkpointing=true: {type(backbone).__name__} has no layers that "
            "transformers can recompute; set gradient_checkpointing: false and lower "
            "gradient_cache_chunk_size instead"
        )
    backbone._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=recompute)  # type: ignore[operator]


def _require_sliceable(backbone: nn.Module, slice_size: int) -> None:
    family = getattr(getattr(backbone, "config", None), "model_type", type(backbone).__name__)
    if family not in FAMILIES:
        raise ConfigError(
            f"gradient_checkpointing_slice_size={slice_size}: layers of {family} in slices were not "
            f"compared with whole ones, only those of {', '.join(sorted(FAMILIES))}; remove it"
        )
