"""Activation checkpointing, by the Hugging Face or the DeepSpeed mechanism."""

from __future__ import annotations

import functools

import deepspeed
from torch import nn
from torch.utils.checkpoint import checkpoint

from vembed_ds.engine.communication import join_deepspeed
from vembed_ds.errors import ConfigError


def enable_activation_checkpointing(backbone: nn.Module, *, mechanism: str) -> None:
    """Recompute the backbone's layers in the backward pass instead of keeping activations.

    Both mechanisms go through the hook that transformers gives every layer, so they compose
    with the gradient cache and every ZeRO stage in the same way; they differ in who stores.

    Args:
        backbone: A Hugging Face model.
        mechanism: ``huggingface``: ``torch.utils.checkpoint``, non-reentrant; the default,
            because it also works when no input of a layer needs a gradient (first layer behind
            a frozen embedding). ``deepspeed``: ``deepspeed.checkpointing``, re-entrant.

    Raises:
        ConfigError: The backbone has no layers that can be recomputed.
    """
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
