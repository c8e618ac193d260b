"""From hidden states to one vector per item, right under either padding side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POOLING_METHODS = ("cls", "mean", "last_token", "pooler", "none")


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


def token_states(outputs: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states of all tokens, or patches, and which of them are real.

    Args:
        outputs: As in :func:`pool`.
        attention_mask: ``[B, L]``; ``None``: every position is real.

    Returns:
        ``[B, L, D]`` and ``[B, L]`` bool.
    """
    hidden_BLD = _as_tokens(outputs.last_hidden_state)
    if attention_mask is None:
        return hidden_BLD, torch.ones(
            hidden_BLD.shape[:2], dtype=torch.bool, device=hidden_BLD.device
        )
    return hidden_BLD, attention_mask.bool()


def best_patches(states_BLD: Tensor, mask_BL: Tensor, *, number: int) -> tuple[Tensor, Tensor]:
    """The class token and the patches that are most like it, in their spatial order.

    Args:
        states_BLD: ``[B, L, D]``; the first is the class token.
        mask_BL: ``[B, L]`` bool, all true: images of one model have equally many patches.
        number: Patches to keep; all when there are no more.

    Returns:
        ``[B, 1 + K, D]`` and its mask.
    """
    number = min(number, states_BLD.shape[1] - 1)
    likeness = torch.cosine_similarity(states_BLD[:, :1].float(), states_BLD[:, 1:].float(), dim=-1)
    chosen = likeness.topk(number, dim=1).indices.sort(dim=1).values + 1
    places = torch.cat([torch.zeros_like(chosen[:, :1]), chosen], dim=1)
    kept = states_BLD.gather(1, places.unsqueeze(-1).expand(-1, -1, states_BLD.shape[2]))
    return kept, mask_BL.gather(1, places)


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
