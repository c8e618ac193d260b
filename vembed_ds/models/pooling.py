"""From hidden states to one vector per item, right under either padding side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POOLING_METHODS = ("cls", "mean", "last_token", "pooler")


def pool(outputs: Any, attention_mask: Tensor | None, *, method: str) -> Tensor:
    """Pool a backbone's output.

    Args:
        outputs: A Hugging Face output; ``last_hidden_state`` is ``[B, L, D]``, or
            ``[B, D, H, W]`` for a convolutional backbone.
        attention_mask: ``[B, L]``, 1 on real tokens; ``None``: every position is real.
        method: ``cls`` (first real token), ``mean`` (over real tokens), ``last_token`` (last
            real token) or ``pooler`` (the backbone's own pooled output).

    Returns:
        ``[B, D]``.

    Raises:
        ValueError: The backbone has no output of that kind.
    """
    if method == "pooler":
        return _own_pooler(outputs)
    hidden = outputs.last_hidden_state
    if hidden.dim() == 4 and method != "mean":
        raise ValueError(
            f"pooling_method={method!r}: this backbone gives a map of features, of which the first "
            "is a corner; choose mean or pooler"
        )
    hidden_BLD = _as_tokens(hidden)
    if method == "mean":
        return _masked_mean(hidden_BLD, attention_mask)
    if attention_mask is None:
        return hidden_BLD[:, 0] if method == "cls" else hidden_BLD[:, -1]
    # argmax finds the first maximum: the first, or counted from the end the last, real token.
    mask = attention_mask.long()
    if method == "cls":
        position = mask.argmax(dim=1)
    elif method == "last_token":
        position = mask.shape[1] - 1 - mask.flip(dims=[1]).argmax(dim=1)
    else:
        raise ValueError(f"pooling_method={method!r}: choose one of {', '.join(POOLING_METHODS)}")
    return hidden_BLD[torch.arange(len(position), device=position.device), position]


def _own_pooler(outputs: Any) -> Tensor:
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        raise ValueError("pooling_method='pooler': this backbone has no pooled output of its own")
    flat: Tensor = pooled.flatten(1)  # convolutional backbones give [B, D, 1, 1]
    return flat


def _as_tokens(hidden: Tensor) -> Tensor:
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


def _masked_mean(hidden_BLD: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return hidden_BLD.mean(dim=1)
    # Sums in float32: in 16 bit a long text's mean would lose digits.
    mask_BL1 = attention_mask.unsqueeze(-1).float()
    total = (hidden_BLD.float() * mask_BL1).sum(dim=1)
    return (total / mask_BL1.sum(dim=1).clamp(min=1.0)).to(hidden_BLD.dtype)
