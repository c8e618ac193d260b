"""The figures of embeddings against plain NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vembed_ds.losses import SAMPLE
from vembed_ds.similarity import Embeddings
from vembed_ds.training.embedding_figures import EmbeddingSample, effective_rank, finished


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_numpy(query: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """One pair of items after the other."""
    found = {}
    q, p = unit(query), unit(positive)
    number = len(q)
    pairs = [(i, j) for i in range(number) for j in range(i)]
    found["embeddings/alignment"] = np.mean(
        [np.sum((a - b) ** 2) for a, b in zip(q, p, strict=True)]
    )
    uniformity = []
    for role, rows, units in (("query", query, q), ("positive", positive, p)):
        found[f"embeddings/{role}_norm"] = np.mean([math.sqrt(sum(row**2)) for row in rows])
        singular = np.linalg.svd(units, compute_uv=False)
        shares = singular[singular > 1e-12] / singular.sum()
        found[f"embeddings/{role}_effective_rank"] = math.exp(-np.sum(shares * np.log(shares)))
        found[f"embeddings/{role}_mean_cosine"] = np.mean([units[i] @ units[j] for i, j in pairs])
        kernels = [math.exp(-2 * np.sum((units[i] - units[j]) ** 2)) for i, j in pairs]
        uniformity.append(math.log(np.mean(kernels)))
    found["embeddings/uniformity"] = np.mean(uniformity)
    return found


def figures(query: np.ndarray, positive: np.ndarray, **options: int) -> dict[str, float]:
    rows = {
        role: Embeddings(torch.from_numpy(values).float())
        for role, values in (("query", query), ("positive", positive))
    }
    return finished(EmbeddingSample(rows, **options).figures())


@pytest.mark.parametrize("shape", [(7, 5), (4, 16), (2, 3)])
def test_they_are_those_of_numpy(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    query, positive = (generator.normal(size=shape).astype(np.float32) for _ in range(2))
    assert figures(query, positive) == pytest.approx(by_numpy(query, positive), rel=1e-5)


def test_only_a_sample_is_looked_at_and_nothing_else_is_held() -> None:
    generator = np.random.default_rng(1)
    query, positive = (generator.normal(size=(SAMPLE + 50, 4)) for _ in range(2))
    expected = by_numpy(query[:SAMPLE], positive[:SAMPLE])
    assert figures(query, positive) == pytest.approx(expected, rel=1e-5)
    values = torch.from_numpy(query)
    sample = EmbeddingSample({"query": Embeddings(values), "positive": Embeddings(values)})
    held = sample._rows["query"].values
    assert held.untyped_storage().nbytes() == SAMPLE * 4 * 8


def test_of_several_layers_the_last_is_looked_at() -> None:
    generator = np.random.default_rng(2)
    query, positive = (generator.normal(size=(5, 6)) for _ in range(2))
    expected = by_numpy(query[:, 4:], positive[:, 4:])
    assert figures(query, positive, num_layers=3) == pytest.approx(expected, rel=1e-5)


def test_collapse_shows() -> None:
    generator = np.random.default_rng(3)
    healthy = figures(generator.normal(size=(64, 8)), generator.normal(size=(64, 8)))
    assert healthy["embeddings/query_effective_rank"] > 7
    assert abs(healthy["embeddings/query_mean_cosine"]) < 0.1
    one = np.ones((64, 8)) + 1e-6 * generator.normal(size=(64, 8))
    collapsed = figures(one, one)
    assert collapsed["embeddings/query_effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert collapsed["embeddings/query_mean_cosine"] == pytest.approx(1.0)
    assert collapsed["embeddings/uniformity"] == pytest.approx(0.0, abs=1e-4)
    assert collapsed["embeddings/alignment"] == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(effective_rank(torch.full((2, 2), math.nan)))


def test_tokens_count_through_their_mean() -> None:
    generator = np.random.default_rng(4)
    tokens = generator.normal(size=(5, 3, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=bool)
    rows = Embeddings(torch.from_numpy(tokens), torch.from_numpy(mask))
    found = finished(EmbeddingSample({"query": rows, "positive": rows}).figures())
    items = np.stack([unit(t[m]).mean(axis=0) for t, m in zip(tokens, mask, strict=True)])
    expected = by_numpy(items, items)
    norms = np.linalg.norm(tokens[mask], axis=1).mean()
    expected |= {f"embeddings/{role}_norm": norms for role in ("query", "positive")}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_one_pair_has_no_others_to_be_compared_with() -> None:
    found = figures(np.array([[3.0, 4.0]]), np.array([[4.0, 3.0]]))
    assert found == pytest.approx(
        {
            "embeddings/query_norm": 5.0,
            "embeddings/positive_norm": 5.0,
            "embeddings/query_effective_rank": 1.0,
            "embeddings/positive_effective_rank": 1.0,
            "embeddings/alignment": 2 - 2 * 0.96,
        },
        rel=1e-5,
    )
