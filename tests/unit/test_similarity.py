"""Cosine and MaxSim, in blocks, with padding, and with nothing real in an item."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vembed_ds import similarity as module
from vembed_ds.similarity import (
    Embeddings,
    concatenate,
    paired_similarity,
    similarity,
    unit_length,
)


def token_items(lengths: list[int], *, seed: int, width: int = 4) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    values = torch.randn(len(lengths), longest, width, generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    # What stands in the padding must not matter, were it not even a number.
    return Embeddings(values.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_(), mask)


def by_hand(rows: Embeddings, columns: Embeddings, reduction: str) -> list[list[float]]:
    """MaxSim pair by pair, on the real tokens only."""

    def real(items: Embeddings, place: int) -> Tensor:
        assert items.mask is not None
        tokens = items.values[place][items.mask[place]].detach().double()
        return tokens / tokens.norm(dim=-1, keepdim=True)

    table = []
    for i in range(len(rows)):
        scores = []
        for j in range(len(columns)):
            query, document = real(rows, i), real(columns, j)
            total = 0.0
            if len(query) and len(document):
                best = [max(float(q @ d) for d in document) for q in query]
                total = sum(best) if reduction == "sum" else sum(best) / len(best)
            scores.append(total)
        table.append(scores)
    return table


ROWS, COLUMNS = [3, 1, 0, 2, 3], [2, 5, 0, 1]


@pytest.mark.parametrize("elements", [1, 40, 2**24])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_maxsim_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, reduction: str, elements: int
) -> None:
    rows, columns = token_items(ROWS, seed=0), token_items(COLUMNS, seed=1)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    found = similarity(rows, columns, reduction=reduction)
    torch.testing.assert_close(
        found, torch.tensor(by_hand(rows, columns, reduction)), rtol=1e-6, atol=1e-6
    )
    found.square().sum().backward()
    for items in (rows, columns):
        assert items.values.grad is not None
        assert items.mask is not None
        assert items.values.grad.isfinite().all()
        assert not items.values.grad[~items.mask].any()
        assert items.values.grad[items.mask].any()


def test_blocks_give_the_gradient_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[Tensor]:
        rows, columns = token_items([3, 2, 3], seed=0), token_items([2, 5], seed=1)
        similarity(rows, columns).exp().sum().backward()
        grads = [rows.values.grad, columns.values.grad]
        return [grad for grad in grads if grad is not None]

    whole = gradients()
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)
    for block, one in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(block, one)


def test_no_block_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = module._maxsim

    def measured(row: Tensor, row_mask: Tensor, column: Tensor, *rest: Any) -> Tensor:
        sizes.append(row_mask.numel() * column.shape[0] * column.shape[1])
        return plain(row, row_mask, column, *rest)

    monkeypatch.setattr(module, "_maxsim", measured)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 40)
    similarity(token_items(ROWS, seed=0), token_items(COLUMNS, seed=1))
    assert max(sizes) <= 40
    assert sum(sizes) == 5 * 3 * 4 * 5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pairs_are_the_diagonal(reduction: str) -> None:
    rows, columns = token_items([3, 1, 0, 2], seed=0), token_items(COLUMNS, seed=1)
    for one, other in ((rows, columns), (vectors(rows), vectors(columns))):
        torch.testing.assert_close(
            paired_similarity(one, other, reduction=reduction),
            similarity(one, other, reduction=reduction).diagonal(),
        )


def vectors(items: Embeddings) -> Embeddings:
    return Embeddings(items.values.detach().nan_to_num().sum(dim=1) + 0.1)


def test_a_vector_of_zeros_has_a_gradient_like_any_other() -> None:
    """PyTorch's is 1e12 times as large: clipped, it would be the whole of the step."""
    rows = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], requires_grad=True)
    columns = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    found = similarity(Embeddings(rows), Embeddings(columns))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [11 / 15, 0.0]]))
    (first, second) = torch.autograd.grad(found.sum(), [rows, columns])
    torch.testing.assert_close(first[0], torch.tensor([1.0, 2.0, 2.0]) / 3)
    torch.testing.assert_close(second[1], torch.tensor([3.0, 0.0, 4.0]) / 5)
    assert first.norm(dim=1).max() <= 1.0


def test_any_other_vector_is_normalised_as_by_pytorch() -> None:
    values = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)) * 1e-3
    ours, plain = values.clone().requires_grad_(), values.clone().requires_grad_()
    weights = torch.arange(9.0)
    (unit_length(ours) * weights).sum().backward()
    (torch.nn.functional.normalize(plain, dim=-1) * weights).sum().backward()
    assert torch.equal(unit_length(ours), torch.nn.functional.normalize(plain, dim=-1))
    assert ours.grad is not None
    assert plain.grad is not None
    assert torch.equal(ours.grad, plain.grad)


def test_nothing_against_nothing_is_an_empty_table() -> None:
    some, none = token_items([2, 1], seed=0), token_items([1], seed=0).rows(slice(0, 0))
    assert similarity(none, some).shape == (0, 2)
    assert similarity(some, none).shape == (2, 0)


def test_parts_are_padded_to_the_longest() -> None:
    parts = [token_items([2, 1], seed=0), token_items([5], seed=1)]
    joined = concatenate(parts)
    assert joined.values.shape == (3, 5, 4)
    assert joined.mask is not None
    assert joined.mask.sum(dim=1).tolist() == [2, 1, 5]
    whole = concatenate([Embeddings(torch.ones(2, 3)), Embeddings(torch.zeros(1, 3))])
    assert whole.mask is None
    assert whole.values.sum(dim=1).tolist() == [3.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("values", "mask", "message"),
    [
        ((2, 3), (2, 3), r"shape \(2, 3\) with a mask of shape \(2, 3\): expected \[n, D\]"),
        ((2, 3, 4), None, r"shape \(2, 3, 4\) with a mask of shape None"),
        ((2, 3, 4), (2, 2), r"shape \(2, 3, 4\) with a mask of shape \(2, 2\)"),
        ((4,), None, r"shape \(4,\) with"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(
    values: tuple[int, ...], mask: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Embeddings(torch.zeros(values), None if mask is None else torch.ones(mask).bool())


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of token embeddings is torch.int64; expected bool"):
        Embeddings(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.int64))


def test_vectors_and_tokens_cannot_be_compared() -> None:
    tokens = token_items([2], seed=0)
    with pytest.raises(ValueError, match=r"\(1, 2, 4\) and \(3, 4\) cannot be compared"):
        similarity(tokens, Embeddings(torch.zeros(3, 4)))
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(3, 4\) cannot be compared"):
        paired_similarity(Embeddings(torch.zeros(3, 5)), Embeddings(torch.zeros(3, 4)))
