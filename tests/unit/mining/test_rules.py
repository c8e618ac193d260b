from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vembed_ds.errors import ConfigError
from vembed_ds.mining.rules import NAMES, Rules, Scored, choose

ONE = Scored(torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, -torch.inf]]), torch.tensor([0.82]))


def places(rules: Rules, scored: Scored = ONE, **options: Any) -> list[list[int]]:
    return choose(
        scored, rules=rules, queries=range(len(scored.positive)), **options
    ).places.tolist()


def rules(**changes: Any) -> Rules:
    return Rules(**{"num_negatives": 2, "relative_margin": None, "range_max": 6, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 1]),
        ({"num_negatives": 6}, [0, 1, 2, 3, 4, -1]),
        ({"margin": 0.0}, [1, 2]),
        ({"margin": 0.05}, [2, 3]),
        ({"relative_margin": 0.1}, [2, 3]),  # at most 0.738
        ({"max_score": 0.65}, [3, 4]),
        ({"min_score": 0.85}, [0, -1]),
        ({"range_min": 1}, [1, 2]),
        ({"range_min": 1, "margin": 0.0}, [2, 3]),  # of what the margin leaves
        ({"range_min": 4, "num_negatives": 2}, [4, -1]),
        ({"min_score": 0.95}, [-1, -1]),
    ],
)
def test_each_rule(changes: dict[str, Any], expected: list[int]) -> None:
    assert places(rules(**changes)) == [expected]


def test_a_relative_margin_of_a_negative_similarity_lowers_the_limit() -> None:
    scored = Scored(torch.tensor([[-0.1, -0.15, -0.25, -0.3]]), torch.tensor([-0.2]))
    # -0.2 * (1 - 0.1) would be -0.18: above the positive
    assert places(rules(relative_margin=0.1), scored) == [[2, 3]]


def test_the_guide_drops_what_it_takes_for_an_answer() -> None:
    guide = Scored(torch.tensor([[0.1, 0.9, 0.49, 0.2, 0.3, 0.0]]), torch.tensor([0.5]))
    assert places(rules(guide_margin=0.0), guide=guide) == [[0, 2]]
    assert places(rules(guide_margin=0.2), guide=guide) == [[0, 3]]
    dropped = choose(ONE, rules=rules(guide_margin=0.2), queries=[0], guide=guide).dropped[0]
    assert dict(zip(NAMES, dropped.tolist(), strict=True))["guide_margin"] == 2


def test_a_candidate_counts_for_the_first_rule_that_drops_it() -> None:
    every = rules(margin=0.0, relative_margin=0.1, max_score=0.65, min_score=0.55, range_min=1)
    dropped = choose(ONE, rules=every, queries=[0]).dropped[0].tolist()
    assert dict(zip(NAMES, dropped, strict=True)) == {
        "margin": 1,
        "relative_margin": 1,
        "max_score": 1,
        "min_score": 1,
        "guide_margin": 0,
        "range_min": 1,
    }


def test_random_ones_depend_on_seed_and_query_only() -> None:
    scored = Scored(torch.linspace(1, 0.1, 40).repeat(50, 1), torch.full((50,), 0.9))
    drawn = rules(sampling="random", margin=0.0, range_max=40, range_min=2, num_negatives=3)
    first = places(drawn, scored)
    assert first == places(drawn, scored)
    assert first != places(rules(**{**drawn.__dict__, "seed": 1}), scored)
    assert len({tuple(row) for row in first}) > 40
    allowed = set(range(7, 40))  # five are closer than 0.9, two are skipped
    assert {place for row in first for place in row} == allowed
    assert all(row == sorted(set(row)) for row in first)
    # The same whichever queries are beside it.
    part = Scored(scored.candidates[7:9], scored.positive[7:9])
    assert choose(part, rules=drawn, queries=[7, 8]).places.tolist() == first[7:9]
    few = Scored(scored.candidates[:1, :8], scored.positive[:1])
    assert places(drawn, few) == [[7, -1, -1]]


def test_how_many_candidates_are_looked_at() -> None:
    assert Rules(num_negatives=5, range_min=3).num_candidates == 53
    assert Rules(num_negatives=5, range_min=3, relative_margin=None).num_candidates == 8
    assert Rules(num_negatives=5, range_max=7).num_candidates == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_negatives": 0}, "--num_negatives 0: give at least 1"),
        ({"range_min": -1}, "--range_min -1: give 0 or more"),
        (
            {"range_min": 10, "range_max": 11},
            "--range_max 11: leaves 1 candidates behind --range_min 10, fewer than --num_negatives 2; "
            "give at least 12",
        ),
        ({"relative_margin": 1.5}, "--relative_margin 1.5: is a share of the positive's score"),
        ({"margin": math.nan}, "--margin nan: is no number that scores can be compared with"),
        ({"guide_margin": math.inf}, "--guide_margin inf: is no number that scores can be"),
        ({"min_score": 0.5, "max_score": 0.4}, "--min_score 0.5: is above --max_score 0.4"),
    ],
)
def test_rules_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        rules(**changes)
    assert str(error.value).startswith(message)
