"""Ranks and metrics against loops in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vembed_ds.errors import VembedError
from vembed_ds.evaluation import metrics
from vembed_ds.evaluation.metrics import mean_reciprocal_rank, recall_at_k
from vembed_ds.similarity import Embeddings


def first_relevant_rank(
    queries: torch.Tensor, corpus: torch.Tensor, relevant: list[list[int]], **options: Any
) -> torch.Tensor:
    pair = Embeddings(queries), Embeddings(corpus)
    return metrics.first_relevant_rank(*pair, relevant, **options)


def top_documents(
    queries: torch.Tensor, corpus: torch.Tensor, *, k: int, chunk_size: int
) -> torch.Tensor:
    pair = Embeddings(queries), Embeddings(corpus)
    return metrics.top_documents(*pair, k=k, chunk_size=chunk_size)


def plain_rank(query: torch.Tensor, corpus: torch.Tensor, relevant: list[int]) -> int:
    cosine = torch.nn.functional.cosine_similarity(query.double()[None], corpus.double()).tolist()
    best = max(cosine[document] for document in relevant)
    ahead = [c for place, c in enumerate(cosine) if place not in relevant and c >= best]
    return 1 + len(ahead)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
def test_ranks_equal_plain_python(generator: torch.Generator, chunk_size: int) -> None:
    queries = torch.randn(11, 6, generator=generator)
    corpus = torch.randn(13, 6, generator=generator) * 100
    relevant = [[row] if row % 3 else [row, 12, 0] for row in range(11)]
    ranks = first_relevant_rank(queries, corpus, relevant, chunk_size=chunk_size)
    expected = [plain_rank(q, corpus, found) for q, found in zip(queries, relevant, strict=True)]
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == expected
    assert len(set(expected)) > 3  # else the case would say little


def test_a_collapsed_model_finds_nothing(generator: torch.Generator) -> None:
    """Equal documents: rounding by the place of a column must not rank them."""
    point = torch.randn(1, 384, generator=generator)
    corpus, queries = point.repeat(1003, 1), torch.randn(9, 384, generator=generator)
    ranks = first_relevant_rank(queries, corpus, [[row] for row in range(9)], chunk_size=4)
    assert ranks.tolist() == [1003] * 9
    assert first_relevant_rank(
        torch.zeros(1, 384), torch.zeros(5, 384), [[2]], chunk_size=1
    ).tolist() == [5]


def test_equally_similar_relevant_documents_do_not_compete() -> None:
    corpus = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ranks = first_relevant_rank(torch.tensor([[2.0, 0.1]]), corpus, [[0, 1]], chunk_size=1)
    assert ranks.tolist() == [1]


def test_an_ignored_document_does_not_compete() -> None:
    queries, corpus = torch.eye(3)[[0, 1, 0]], torch.eye(3)
    relevant = [[1], [0], [2]]
    plain = first_relevant_rank(queries, corpus, relevant, chunk_size=2)
    assert plain.tolist() == [3, 3, 3]
    found = first_relevant_rank(queries, corpus, relevant, chunk_size=2, ignored=[0, None, 0])
    assert found.tolist() == [2, 3, 2]


def test_half_precision_is_compared_in_float32(generator: torch.Generator) -> None:
    queries = torch.randn(5, 64, generator=generator).bfloat16()
    corpus = torch.randn(50, 64, generator=generator).bfloat16()
    relevant = [[row] for row in range(5)]
    half = first_relevant_rank(queries, corpus, relevant, chunk_size=2)
    whole = first_relevant_rank(queries.float(), corpus.float(), relevant, chunk_size=2)
    assert half.tolist() == whole.tolist()


def test_recall_and_reciprocal_rank() -> None:
    ranks = torch.tensor([1, 2, 4, 10])
    assert [recall_at_k(ranks, k) for k in (1, 2, 4, 10)] == [0.25, 0.5, 0.75, 1.0]
    assert mean_reciprocal_rank(ranks) == pytest.approx((1 + 0.5 + 0.25 + 0.1) / 4)


def test_no_queries_have_no_ranks() -> None:
    assert first_relevant_rank(torch.ones(0, 2), torch.ones(3, 2), [], chunk_size=1).tolist() == []


def test_top_documents_are_ordered() -> None:
    corpus = torch.tensor([[0.0, 1.0], [5.0, 0.0], [1.0, 1.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.9]])
    found = top_documents(queries, corpus, k=2, chunk_size=2)
    assert found.tolist() == [[1, 2], [0, 2], [2, 1]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite(value: float) -> None:
    broken, whole = torch.ones(7, 3), torch.ones(7, 3)
    broken[[1, 4], 2] = value
    relevant = [[row] for row in range(7)]
    with pytest.raises(VembedError, match="2 of 7 query embeddings are NaN or infinite"):
        first_relevant_rank(broken, whole, relevant, chunk_size=2)
    with pytest.raises(VembedError, match=r"2 of 7 document embeddings .* the model has diverged"):
        first_relevant_rank(whole, broken, relevant, chunk_size=2)


@pytest.mark.parametrize("relevant", [[[0], []], [[0]]])
def test_every_query_needs_a_relevant_document(relevant: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"2 queries, . lists of relevant documents"):
        first_relevant_rank(torch.ones(2, 3), torch.ones(2, 3), relevant, chunk_size=1)
