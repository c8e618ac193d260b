"""The gate: another gradient, on any rank or in the next step, gets no figures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.gate import Expected, judge
from benchmarks.report import table

EXPECTED = Expected(losses=(2.0, 1.9), norm=1.5)


def rank(loss: float = 2.0, later: float = 1.9, norm: float = 1.5) -> dict[str, Any]:
    return {"losses": [loss, later], "norms": [norm, 1.4]}


def test_the_losses_of_the_ranks_are_averaged() -> None:
    assert judge([rank(loss=1.5), rank(loss=2.5)], EXPECTED).right


@pytest.mark.parametrize(
    "ranks",
    [
        [rank(norm=1.6)],
        [rank(), rank(norm=1.4)],
        [rank(loss=2.1)],
        [rank(later=2.0)],  # the right norm, and an update in another direction, or none
        [rank(norm=math.nan)],
        [rank(loss=math.inf)],
    ],
)
def test_what_differs_is_wrong(ranks: list[dict[str, Any]]) -> None:
    assert not judge(ranks, EXPECTED).right


def test_the_norm_that_is_farthest_off_is_shown() -> None:
    verdict = judge([rank(), rank(norm=3.6)], EXPECTED)
    assert verdict.norm == 3.6
    assert verdict.error == pytest.approx(1.4)


def test_the_table_shows_what_is_wrong_without_its_speed() -> None:
    columns = {"ratio": ("ratio", "{:.2f}"), "gradient norm": ("norm", "{:.4f}")}
    right = {"variant": "right", "status": "measured", "ratio": 1.0, "norm": 1.5}
    wrong = {"variant": "fast", "status": "wrong", "norm": 3.6206}
    failed = {"variant": "broken", "status": "failed"}
    lines = table(columns, [right, wrong, failed]).splitlines()
    assert lines[2:] == [
        "| right | 1.00 | 1.5000 |",
        "| fast **WRONG** | - | 3.6206 |",
        "| broken **failed** | - | - |",
    ]
