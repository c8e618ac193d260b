"""What was to be reached, and whether the figures of a run reach it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from benchmarks.options import Row

Rows = Sequence[Row]
Figure = Callable[[Rows], float | None]  # None: not measured

SLACK = 1.05  # peaks of equal memory differ by so much from run to run
ONE_KEPT = {"gradient_cache_kept_graphs": 1}  # of ours: all but a chunk computed twice, as peers do


@dataclass(frozen=True)
class Target:
    """One line of the issue's table.

    Attributes:
        workload: Its number.
        text: In words.
        figure: From the rows of a run.
        limit: What the figure must not exceed.
        unit: Behind both.
        best_peer: What the best of the others had when the target was set.
        at_least: The limit must be reached, not kept.
    """

    workload: str
    text: str
    figure: Figure
    limit: float
    unit: str
    best_peer: str
    at_least: bool = False


class Outcome(NamedTuple):
    """Of a target in a run; ``None``: it was not measured."""

    target: Target
    figure: float | None
    reached: bool | None


def judge_targets(workload: str, rows: Rows) -> list[Outcome]:
    """Every target of a workload against rows that have passed the gate."""
    outcomes = []
    measured = [row for row in rows if row["status"] == "measured"]
    for target in (t for t in TARGETS if t.workload == workload):
        figure = target.figure(measured)
        holds = operator.ge if target.at_least else operator.le
        reached = None if figure is None else holds(figure, target.limit)
        outcomes.append(Outcome(target, figure, reached))
    return outcomes


def least(rows: Rows, key: str, **wanted: object) -> float | None:
    """The smallest figure of the rows that have these values."""
    found = [
        row[key]
        for row in rows
        if row.get(key) is not None and all(row.get(name) == v for name, v in wanted.items())
    ]
    return min(found, default=None)


def _ours_within(rows: Rows, memory: float | None) -> float | None:
    """Our best ratio of those that need at most so much memory."""
    if memory is None:
        return None
    return least([r for r in rows if r.get("peak_mb", memory + 1) <= memory], "ratio", peer="ours")


def _half_of_plain(rows: Rows) -> float | None:
    plain = least(rows, "peak_mb", variant="plain torch")
    return _ours_within(rows, None if plain is None else plain / 2)


def _as_small_as_peers(rows: Rows) -> float | None:
    smallest = least([row for row in rows if row["peer"] != "ours"], "peak_mb")
    return _ours_within(rows, None if smallest is None else SLACK * smallest)


def _megabytes(*stages: int, **wanted: object) -> Figure:
    """The most of these stages, each at its best."""

    def figure(rows: Rows) -> float | None:
        found = [least(rows, "counted_mb", peer="ours", stage=stage, **wanted) for stage in stages]
        return None if None in found else max(f for f in found if f is not None)

    return figure


def _slowest_stage(rows: Rows) -> float | None:
    found = [least(rows, "ratio", peer="ours", stage=stage, **ONE_KEPT) for stage in range(4)]
    return None if None in found else max(f for f in found if f is not None)


def _against_ours(key: str) -> Figure:
    """How many times sentence-transformers' best the figure is of ours, which keeps as few graphs."""

    def figure(rows: Rows) -> float | None:
        mine, theirs = least(rows, key, peer="ours", **ONE_KEPT), least(rows, key, peer="st")
        return None if mine is None or theirs is None else theirs / mine

    return figure


def _small_clip(rows: Rows) -> float | None:
    """Of those whose number of kept graphs is set: where all are kept it is the plain step."""
    own = [row for row in rows if row.get("gradient_cache_kept_graphs") is not None]
    return least(own, "ratio", peer="ours")


def _loss_memory(rows: Rows) -> float | None:
    return least(rows, "peak_mb", peer="ours", pairs=8192)


def _rows_saved(rows: Rows) -> float | None:
    """The least share of ``1 / (1 - rho)`` that we save, over all rho."""
    shares = []
    for rho in {row["rho"] for row in rows}:
        mine = least(rows, "rows", peer="ours", rho=rho)
        every = least(rows, "rows", peer="plain", rho=rho)
        if mine is None or every is None:
            return None
        shares.append(every / mine * (1 - rho))
    return min(shares, default=None)


def _later_forwards(rows: Rows) -> float | None:
    found = [
        row["later_forwards"] for row in rows if row.get("teacher") in ("cached", "first epoch")
    ]
    return max(found, default=None)


def _worst_prediction(rows: Rows) -> float | None:
    errors = [
        100 * abs(row["counted_mb"] / row["predicted_mb"] - 1)
        for row in rows
        if "counted_mb" in row
    ]
    return max(errors, default=None)


def _samples(rows: Rows) -> float | None:
    """Our samples per second against the peers' caches, at no more memory, where it is least."""
    ratios = []
    for shape in {row["shape"] for row in rows}:
        own = [row for row in rows if row["shape"] == shape]
        for theirs in (r for r in own if r["peer"] != "ours" and "cached" in r["variant"]):
            mine = [
                row["samples"]
                for row in own
                if row["peer"] == "ours" and row["gpu_mb"] <= SLACK * theirs["gpu_mb"]
            ]
            ratios.append(max(mine, default=0.0) / theirs["samples"])
    return min(ratios, default=None)


def _stall(rows: Rows) -> float | None:
    return max((row["verified_cpu"] for row in rows), default=None)


TARGETS = (
    Target("W1", "time of plain torch at half its memory", _half_of_plain, 1.15, "x", "1.26x"),
    Target(
        "W1", "time of plain torch at the smallest peer's memory", _as_small_as_peers, 1.25, "x", "1.26x"
    ),
    Target("W2", "bytes of a step, ZeRO-0", _megabytes(0), 112, "MB", "112 (DDP), 225 (DDP, GradCache)"),
    Target("W2", "bytes of a step, ZeRO-1 and 2", _megabytes(1, 2), 169, "MB", "953"),
    Target("W2", "bytes of a step, ZeRO-3, gathered once", _megabytes(3, zero3_gather=None), 169, "MB", "169 (FSDP2, two flags)"),
    Target(
        "W2",
        "bytes of a step, ZeRO-3, gathered per chunk",
        _megabytes(3, zero3_gather="cache_pass"),
        673,
        "MB",
        "1,459 (FSDP2)",
    ),
    Target("W2", "CPU time against DDP, the slowest stage, one graph kept", _slowest_stage, 1.47, "x", "1.47x (FSDP2)"),
    Target("W3", "fewer padded tokens than sentence-transformers", _against_ours("tokens"), 1.8, "x", "1.0x", True),
    Target("W3", "faster than sentence-transformers cached, one graph kept", _against_ours("cpu_seconds"), 1.8, "x", "1.0x", True),
    Target("W4", "time of plain torch, cached, at most half of the graphs kept", _small_clip, 1.2, "x", "1.3x"),
    Target("W5", "memory of the loss of 8,192 pairs", _loss_memory, 40, "MB", "330 MB (rows)"),
    # W5 runs on a CPU only, so far.
    Target("W5", "the same of 65,536 on a GPU", partial(least, key="gpu_mb", peer="ours", pairs=65536), 1024, "MB", "24 GB (whole)"),
    Target("W5", "its time against the whole on a GPU", partial(least, key="gpu_ratio", peer="ours"), 1.1, "x", "1.0x"),
    Target("W6", "share of 1 / (1 - rho) fewer encoder rows", _rows_saved, 1.0, "x", "none", True),
    Target("W7", "teacher forwards in the second epoch", _later_forwards, 0, "", "all"),
    Target("W8", "samples per second of the peers' caches at equal memory", _samples, 1.3, "x", "1.0x", True),
    Target("W9", "CPU time of a verified save against DeepSpeed's", _stall, 1.2, "x", "-"),
    Target("W10", "counted bytes off the cost model", _worst_prediction, 1.0, "%", "-"),
)  # fmt: skip
