"""Targets: which rows count, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.targets import ONE_KEPT, TARGETS, Outcome, judge_targets


def row(variant: str, peer: str, **figures: Any) -> dict[str, Any]:
    return {"variant": variant, "peer": peer, "status": "measured", **figures}


def outcomes(workload: str, rows: list[dict[str, Any]]) -> dict[str, Outcome]:
    return {found.target.text: found for found in judge_targets(workload, rows)}


PLAIN = row("plain torch", "plain", ratio=1.0, peak_mb=1000)
SMALL = row("sentence-transformers, cached", "st", ratio=1.26, peak_mb=200)
SLOWEST = "CPU time against DDP, the slowest stage, one graph kept"
HALF = "time of plain torch at half its memory"
SMALLEST = "time of plain torch at the smallest peer's memory"


def test_the_best_of_ours_within_the_memory_counts() -> None:
    ours = [
        row("ours, all kept", "ours", ratio=1.0, peak_mb=900),
        row("ours, half kept", "ours", ratio=1.14, peak_mb=480),
        row("ours, cached", "ours", ratio=1.27, peak_mb=205),
    ]
    found = outcomes("W1", [PLAIN, SMALL, *ours])
    assert (found[HALF].figure, found[HALF].reached) == (1.14, True)
    assert (found[SMALLEST].figure, found[SMALLEST].reached) == (1.27, False)


def test_a_peer_does_not_reach_our_target() -> None:
    found = outcomes("W1", [PLAIN, SMALL])
    assert found[HALF].reached is None


def test_what_did_not_pass_the_gate_reaches_nothing() -> None:
    wrong = row("ours, half kept", "ours", ratio=1.0, peak_mb=10) | {"status": "wrong"}
    assert outcomes("W1", [PLAIN, SMALL, wrong])[HALF].figure is None


def test_the_worst_stage_counts_and_a_missing_one_is_not_measured() -> None:
    rows = [
        row(f"ours, {s}", "ours", stage=s, ratio=1.2 + s / 10, counted_mb=112, **ONE_KEPT)
        for s in range(4)
    ]
    rows.append(row("ours, as it comes", "ours", stage=3, ratio=1.0, counted_mb=112))
    found = outcomes("W2", rows)[SLOWEST]
    assert (found.figure, found.reached) == (pytest.approx(1.5), False)
    assert outcomes("W2", rows[:3])[SLOWEST].figure is None


def test_each_way_to_gather_has_a_target_of_its_own() -> None:
    rows = [
        row("ours, auto", "ours", stage=3, counted_mb=700),
        row("ours, cache_pass", "ours", stage=3, counted_mb=560, zero3_gather="cache_pass"),
    ]
    found = outcomes("W2", rows)
    assert found["bytes of a step, ZeRO-3, gathered once"].figure == 700
    assert found["bytes of a step, ZeRO-3, gathered per chunk"].figure == 560


def test_what_keeps_all_graphs_is_no_cache() -> None:
    rows = [
        row("ours, as it comes", "ours", ratio=1.0),
        row("ours, half kept", "ours", ratio=1.25, gradient_cache_kept_graphs=4),
    ]
    (found,) = judge_targets("W4", rows)
    assert (found.figure, found.reached) == (1.25, False)


def test_at_least() -> None:
    rows = [
        row("sentence-transformers, cached", "st", tokens=2000, cpu_seconds=2.0),
        row("ours, cached", "ours", tokens=1000, cpu_seconds=1.2, **ONE_KEPT),
        row("ours, as it comes", "ours", tokens=1000, cpu_seconds=0.8),
    ]
    found = outcomes("W3", rows)
    assert found["fewer padded tokens than sentence-transformers"].reached is True
    assert found["faster than sentence-transformers cached, one graph kept"].reached is False


def test_every_share_of_repeated_texts_counts() -> None:
    rows = [
        row("plain torch", "plain", rho=0.5, rows=100),
        row("ours", "ours", rho=0.5, rows=50),
        row("plain torch", "plain", rho=0.25, rows=100),
        row("ours", "ours", rho=0.25, rows=100),
    ]
    (found,) = judge_targets("W6", rows)
    assert (found.figure, found.reached) == (0.75, False)


def test_bytes_are_held_against_the_prediction() -> None:
    rows = [
        row("ours, 1 rank", "ours", predicted_mb=0.0),
        row("ours, 2 ranks", "ours", predicted_mb=100.0, counted_mb=102.0),
    ]
    (found,) = judge_targets("W10", rows)
    assert (found.figure, found.reached) == (pytest.approx(2.0), False)


@pytest.mark.parametrize("workload", sorted({target.workload for target in TARGETS}))
def test_nothing_measured_is_nothing_reached(workload: str) -> None:
    assert all(found.reached is None for found in judge_targets(workload, []))
