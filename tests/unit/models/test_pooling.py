"""Pooling is right under either padding side."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vembed_ds.models.pooling import pool

HIDDEN = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3)
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
LEFT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("method", "mask", "rows"),
    [
        ("cls", RIGHT, [0, 0]),
        ("cls", LEFT, [1, 0]),
        ("last_token", RIGHT, [2, 3]),
        ("last_token", LEFT, [3, 3]),
        ("cls", None, [0, 0]),
        ("last_token", None, [3, 3]),
    ],
)
def test_token_pooling_takes_a_real_token(
    method: str, mask: torch.Tensor | None, rows: list[int]
) -> None:
    pooled = pool(SimpleNamespace(last_hidden_state=HIDDEN), mask, method=method)
    assert torch.equal(pooled, HIDDEN[torch.arange(2), torch.tensor(rows)])


@pytest.mark.parametrize("mask", [RIGHT, LEFT])
def test_mean_counts_real_tokens_only(mask: torch.Tensor) -> None:
    pooled = pool(SimpleNamespace(last_hidden_state=HIDDEN), mask, method="mean")
    for row in range(2):
        torch.testing.assert_close(pooled[row], HIDDEN[row][mask[row].bool()].mean(0))


def test_mean_of_a_feature_map_is_over_its_places() -> None:
    feature_map = torch.randn(2, 3, 4, 5)
    pooled = pool(SimpleNamespace(last_hidden_state=feature_map), None, method="mean")
    torch.testing.assert_close(pooled, feature_map.mean(dim=(2, 3)))


def test_own_pooler_is_flattened() -> None:
    outputs = SimpleNamespace(pooler_output=torch.randn(2, 3, 1, 1))
    assert pool(outputs, None, method="pooler").shape == (2, 3)


def test_a_backbone_without_pooler_is_refused() -> None:
    with pytest.raises(ValueError, match="no pooled output of its own"):
        pool(SimpleNamespace(pooler_output=None), None, method="pooler")


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of cls, mean, last_token, pooler"):
        pool(SimpleNamespace(last_hidden_state=HIDDEN), RIGHT, method="max")
