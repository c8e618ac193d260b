"""Embeddings go back to their roles, token embeddings no longer than their role's longest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vembed_ds.data.batches import collect_roles
from vembed_ds.data.processors import EncodedItem

LENGTHS = [2, 3, 5, 1]  # two chunks of two texts


def plan(**roles: list[int]) -> Any:
    """Texts of those lengths, by role; nothing else of a plan is read."""
    items = [EncodedItem("text", {"input_ids": np.ones(n, np.int64)}) for n in LENGTHS]
    return SimpleNamespace(
        streams={"text": items},
        roles={role: [("text", place) for place in places] for role, places in roles.items()},
        chunks=[{"text": slice(0, 2)}, {"text": slice(2, 4)}],
    )


def output(lengths: list[int], *, more: int = 0) -> dict[str, torch.Tensor]:
    """A chunk's tokens, each of its text's length; ``more`` patches behind the longest text."""
    width = max(lengths) + more
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    real |= torch.arange(width) >= max(lengths)
    values = torch.tensor(lengths, dtype=torch.float32)[:, None, None].expand(-1, width, 4)
    return {"text": values, "text/mask": real}


def test_padding_of_other_roles_is_left_out() -> None:
    outputs = [output(LENGTHS[:2]), output(LENGTHS[2:])]
    found = collect_roles(plan(query=[1, 0], positive=[2, 3], negative=[]), outputs)
    shapes = {role: tuple(rows.values.shape) for role, rows in found.items()}
    assert shapes == {"query": (2, 3, 4), "positive": (2, 5, 4), "negative": (0, 1, 4)}
    query = found["query"]
    assert query.values[:, 0, 0].tolist() == [3, 2]
    assert query.mask is not None
    assert query.mask.tolist() == [[True, True, True], [True, True, False]]


def test_patches_behind_a_text_are_kept() -> None:
    outputs = [output(LENGTHS[:2], more=2), output(LENGTHS[2:], more=2)]
    found = collect_roles(plan(query=[0], positive=[3]), outputs)
    for role, length in (("query", 2), ("positive", 1)):
        mask = found[role].mask
        assert mask is not None
        assert int(mask.sum()) == length + 2
