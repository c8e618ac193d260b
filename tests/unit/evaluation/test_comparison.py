"""Confidence intervals of differences."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from vembed_ds.evaluation import comparison
from vembed_ds.evaluation.comparison import paired_intervals


def test_equals_scipy() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.random(80), generator.random(80) ** 0.5
    (found,) = paired_intervals({"mrr": before}, {"mrr": after}, resamples=20_000).values()
    expected = stats.bootstrap(
        (after - before,), np.mean, n_resamples=20_000, method="percentile", rng=generator
    ).confidence_interval
    assert found == pytest.approx(tuple(expected), abs=2e-3)
    assert found.decided


def test_intervals_cover_the_truth() -> None:
    """Of 300 data sets, with 60 queries each, about 95 % of the intervals hold the true mean."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        hard = generator.random(60)  # makes a query hard for both models
        before = (generator.random(60) < 0.7 * hard).astype(float)
        after = (generator.random(60) < 0.7 * hard + 0.1).astype(float)
        found = paired_intervals({"hit": before}, {"hit": after}, resamples=300, seed=seed)["hit"]
        covered += found.low <= 0.1 <= found.high
    assert 0.91 <= covered / 300 <= 0.98


def test_what_both_models_share_does_not_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(500)
    noise = 0.01 * generator.random(500)
    paired = paired_intervals({"mrr": hard}, {"mrr": hard + noise})["mrr"]
    mixed = paired_intervals({"mrr": hard}, {"mrr": generator.permutation(hard) + noise})["mrr"]
    assert paired.high - paired.low < 0.1 * (mixed.high - mixed.low)
    assert paired.decided
    assert not mixed.decided


def test_results_are_repeatable_and_do_not_depend_on_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(0)
    before, after = (
        {"a": generator.random(50), "b": generator.random(50)},
        {"b": generator.random(50)},
    )
    first = paired_intervals(before, after)
    monkeypatch.setattr(comparison, "CHUNK_ELEMENTS", 777)
    assert paired_intervals(before, after) == first
    assert list(first) == ["b"]
    assert paired_intervals({"a": before["a"]}, after) == {}


def test_equal_models_do_not_differ() -> None:
    values = {"mrr": np.linspace(0, 1, 9)}
    (found,) = paired_intervals(values, values).values()
    assert found == (0, 0)
    assert not found.decided


def test_other_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="different numbers of queries"):
        paired_intervals({"mrr": np.zeros(3)}, {"mrr": np.zeros(4)})
