"""The sum over the bits of a tensor: no change of one element escapes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vembed_ds.engine import replicas
from vembed_ds.engine.replicas import checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def some(dtype: torch.dtype, size: int = 1000) -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 50 + 100
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_equal_tensors_have_equal_sums(dtype: torch.dtype) -> None:
    assert checksum(some(dtype)) == checksum(some(dtype).view(10, 100))
    assert checksum(some(dtype)).dtype == torch.int64


@pytest.mark.parametrize("block", [1, 7, 10**6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    monkeypatch.setattr(replicas, "CPU_BLOCK", block)
    plain = some(dtype, 20)
    expected = checksum(plain)
    bits = 8 * plain.element_size()
    for place in (0, 7, 19):
        for bit in range(bits):
            changed = plain.clone()
            as_bytes = changed.view(torch.uint8)
            as_bytes[place * bits // 8 + bit // 8] ^= 1 << bit % 8
            assert checksum(changed) != expected


def test_places_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (1, 4, 2**17):
        monkeypatch.setattr(replicas, "CPU_BLOCK", block)
        assert checksum(torch.tensor([1.0, 2.0])) != checksum(torch.tensor([2.0, 1.0]))
        assert checksum(torch.zeros(5)) == checksum(torch.zeros(7)) == 0


def test_the_sign_of_zero_counts_and_nan_equals_itself() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([torch.nan])) == checksum(torch.tensor([torch.nan]))


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ([1, 1, 2, 1], "on rank 2 other than on the 3 others"),
        ([1, 2], "on rank 1 other than on rank 0 (no majority says which is right)"),
        ([2, 1, 1], "on rank 0 other than on the 2 others"),
        ([1, 2, 3], "on rank 1, 2 other than on rank 0 (no majority says which is right)"),
    ],
)
def test_who_differs(values: list[int], where: str) -> None:
    ranks = [{"a": 0, "b": value, "c": 2 * value} for value in values]
    assert replicas._describe(ranks, 7).startswith(
        f"step 7: the ranks no longer hold the same model: b, and 1 more of 3, {where}."
    )


def test_ranks_that_hold_other_tensors_are_told() -> None:
    assert replicas._describe([{"a": 1}, {"a": 1, "b": 0}], 3) == (
        "step 3: the ranks hold different tensors: b"
    )
