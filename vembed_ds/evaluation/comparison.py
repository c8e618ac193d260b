"""How sure the difference between two models is, measured on the same queries."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vembed_ds.evaluation.scoring import Values

RESAMPLES = 2000
LEVEL = 0.95
CHUNK_ELEMENTS = 2**22  # weights of queries held at a time


class Interval(NamedTuple):
    """Where a difference lies, with 95 % confidence."""

    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether it leaves no doubt which model is better."""
        return self.low > 0 or self.high < 0


def paired_intervals(
    before: Values, after: Values, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Bootstrap confidence intervals of the mean differences (Efron 1979; percentiles).

    Queries are drawn with replacement, both models' values of a query together, so that what makes
    a query hard for both does not widen the interval. They say how the result depends on which
    queries were asked, not on the seed of training.

    Args:
        before: Metric to values ``[Q]``.
        after: The same of the other model, on the same queries in the same order.
        resamples: How often all queries are drawn.
        seed: Of the drawing.

    Returns:
        For every metric that both have, the middle 95 % of the means of ``after - before``.

    Raises:
        ValueError: The models have different numbers of queries.
    """
    names = [name for name in after if name in before]
    if not names:
        return {}
    if any(len(before[name]) != len(after[name]) for name in names):
        raise ValueError("the models were measured on different numbers of queries")
    differences = np.stack([after[name] - before[name] for name in names])
    size = differences.shape[1]
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK_ELEMENTS // size)
    means = [
        generator.multinomial(size, np.full(size, 1 / size), size=min(step, resamples - start))
        @ differences.T
        / size
        for start in range(0, resamples, step)
    ]
    edges = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(np.concatenate(means), edges, axis=0)
    return {
        name: Interval(float(left), float(right))
        for name, left, right in zip(names, low, high, strict=True)
    }
