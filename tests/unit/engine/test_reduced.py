"""The norm of pieces of a gradient, in float32 whatever they are in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from vembed_ds.engine.reduced import norm_of


def norm(*pieces: Tensor) -> float:
    return float(norm_of([(nn.Parameter(torch.zeros(1)), piece) for piece in pieces]))


def test_it_is_that_of_all_numbers_together() -> None:
    assert norm(torch.tensor([3.0, 0.0]), torch.zeros(0), torch.tensor([[4.0]])) == 5.0
    assert norm() == 0.0


def test_fp16_may_have_a_norm_that_is_too_large_for_fp16() -> None:
    assert norm(torch.full((100,), 6e4, dtype=torch.float16)) == pytest.approx(6e5, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_number_shows(dtype: torch.dtype, value: float) -> None:
    bad = torch.ones(1000, dtype=dtype)
    bad[777] = value
    assert not math.isfinite(norm(torch.ones(5, dtype=dtype), bad))
