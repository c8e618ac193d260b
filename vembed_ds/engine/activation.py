"""Activation checkpointing, by the Hugging Face or the DeepSpeed mechanism."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vembed_ds.distributed.seeding import RngState, capture_rng, restore_rng
from vembed_ds.engine.communication import join_deepspeed
from vembed_ds.engine.sliced_layers import FAMILIES, slice_layers
from vembed_ds.errors import ConfigError

_HOST = torch.device("cpu")


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
        keep = functools.partial(checkpoint, use_reentrant=False)
    else:
        join_deepspeed()  # `configure` asks DeepSpeed for the rank
        deepspeed.checkpointing.configure(None)
        keep = deepspeed.checkpointing.checkpoint
    if not getattr(backbone, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"gradient_checkpointing=true: {type(backbone).__name__} has no layers that "
            "transformers can recompute; set gradient_checkpointing: false and lower "
            "gradient_cache_chunk_size instead"
        )
    backbone._set_gradient_checkpointing(  # type: ignore[operator]
        enable=True, gradient_checkpointing_func=_Recomputation(keep)
    )


def repeat_all_draws(model: nn.Module) -> None:
    """Let layers that are computed again draw what they drew before, from Python's and NumPy's generators too.

    Both mechanisms put back torch's only (slices all). Not always done: to take and put back NumPy's
    state takes a third of a millisecond per layer.

    Args:
        model: With or without layers that are computed again.
    """
    for module in model.modules():
        recomputation = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(recomputation, _Recomputation):
            recomputation.repeats_all_draws = True


class _Recomputation:
    """What transformers calls in the place of a layer's forward pass; one for all layers.

    Args:
        keep: Of the mechanism.
    """

    def __init__(self, keep: Callable[..., Any]) -> None:
        self._keep = keep
        self.repeats_all_draws = False

    def __call__(self, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        repeated = _Repeatable(run) if self.repeats_all_draws else run
        return self._keep(repeated, *arguments, **options)


class _Repeatable:
    """A forward pass that draws the same numbers whenever it is made."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._state: RngState | None = None  # before the first time

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        before = capture_rng(_HOST)
        if self._state is None:
            self._state = before
            return self._run(*arguments, **options)
        restore_rng(self._state, _HOST)
        try:
            return self._run(*arguments, **options)
        finally:  # torch leaves it by an exception, as soon as it has what it needs
            restore_rng(before, _HOST)


def _require_sliceable(backbone: nn.Module, slice_size: int) -> None:
    family = getattr(getattr(backbone, "config", None), "model_type", type(backbone).__name__)
    if family not in FAMILIES:
        raise ConfigError(
            f"gradient_checkpointing_slice_size={slice_size}: layers of {family} in slices were not "
            f"compared with whole ones, only those of {', '.join(sorted(FAMILIES))}; remove it"
        )
