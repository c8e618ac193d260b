"""Embeddings go back to their roles, token embeddings no longer than their role's longest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from vembed_ds.data.batches import collect_roles
from vembed_ds.data.processors import EncodedItem

LENGTHS = [2, 3, 5, 1]  # two chunks of two texts


def plan(stream: str = "text", **roles: list[int]) -> Any:
    """Items with texts of those lengths, by role; nothing else of a plan is read."""
    items = [EncodedItem(stream, {"input_ids": np.ones(n, np.int64)}) for n in LENGTHS]
    return SimpleNamespace(
        streams={stream: items},
        roles={role: [(stream, place) for place in places] for role, places in roles.items()},
        chunks=[{stream: slice(0, 2)}, {stream: slice(2, 4)}],
    )


def output(stream: str, lengths: list[int], *, padding: int = 0, patches: int = 0) -> Any:
    """A chunk's tokens: of texts padded further than the longest, and of patches behind them."""
    width = max(lengths) + padding
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    real = functional.pad(real, (0, patches), value=True)
    values = torch.tensor(lengths, dtype=torch.float32)[:, None, None]
    return {stream: values.expand(-1, width + patches, 4), f"{stream}/mask": real}


@pytest.mark.parametrize("padding", [0, 3])
def test_padding_of_other_roles_is_left_out(padding: int) -> None:
    outputs = [output("text", lengths, padding=padding) for lengths in (LENGTHS[:2], LENGTHS[2:])]
    found = collect_roles(plan(query=[1, 0], positive=[2, 3], negative=[]), outputs)
    shapes = {role: tuple(rows.values.shape) for role, rows in found.items()}
    assert shapes == {"query": (2, 3, 4), "positive": (2, 5, 4), "negative": (0, 1, 4)}
    query = found["query"]
    assert query.values[:, 0, 0].tolist() == [3, 2]
    assert query.mask is not None
    assert query.mask.tolist() == [[True, True, True], [True, True, False]]


def test_patches_behind_a_text_are_kept() -> None:
    outputs = [output("joint", lengths, patches=2) for lengths in (LENGTHS[:2], LENGTHS[2:])]
    found = collect_roles(plan("joint", query=[0], positive=[3]), outputs)
    for role, length in (("query", 2), ("positive", 1)):
        mask = found[role].mask
        assert mask is not None
        assert int(mask.sum()) == length + 2
