"""One tensor from whatever a model gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def maybe_first(output: Any) -> Tensor:
    """The embeddings in a model's output.

    Args:
        output: A tensor; a tuple whose first entry is one (embeddings and mask); what an
            ``EmbeddingModel`` gives for one stream (a mapping); or a Hugging Face output, of which
            the pooled part is taken, else the first token.

    Returns:
        ``[n, D]``, or ``[n, L, D]`` where the output holds token embeddings.

    Raises:
        TypeError: There is no tensor in it, or more than one stream's.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    pooled = getattr(output, "pooler_output", None)
    if isinstance(pooled, Tensor):
        return pooled
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        return hidden[:, 0]
    if isinstance(output, dict):
        streams = [name for name in output if "/" not in name and not name.startswith("logit_")]
        if len(streams) == 1:
            return maybe_first(output[streams[0]])
    raise TypeError(f"{type(output).__name__}: holds no embeddings, or those of several streams")
