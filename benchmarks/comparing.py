"""Variants of training one task against each other, in one launch.

First the gate: every variant takes two steps without dropout, which everybody computes alike. Those
that are right are timed with dropout, round after round, each in a world of its own so that memory is
its own; every second round in the opposite order.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

from benchmarks.gate import STEPS, Expected, judge, reference
from benchmarks.measuring import RankError, run_ranks
from benchmarks.meter import Meter
from benchmarks.options import CODE, Options, Result, Row
from benchmarks.peers.job import CPU, Job, Setting, Variant
from benchmarks.task import Task, write_task
from benchmarks.traffic import sent_over_gloo

TASK = "task"
World = list[dict[str, Any]]  # what each rank measured
Predict = Callable[[Variant, Task], float]  # bytes of a step, of all ranks together

TIME = {"CPU s": ("cpu_seconds", "{:.2f}"), "ratio": ("ratio", "{:.2f}")}
MEMORY = {"peak MB": ("peak_mb", "{:.0f}"), "all MB": ("whole_mb", "{:.0f}")}
TRAFFIC = {"counted MB": ("counted_mb", "{:.1f}"), "wire MB": ("wire_mb", "{:.1f}")}
GATE = {
    "loss": ("loss", "{:.6f}"),
    "gradient norm": ("norm", "{:.6f}"),
    "error": ("error", "{:.0e}"),
}


def compare(
    task: Task,
    variants: Sequence[Variant],
    options: Options,
    *,
    base: str,
    columns: Mapping[str, tuple[str, str]],
    predict: Predict | None = None,
    setting: Setting = CPU,
) -> Result:
    """Measure variants of training a task.

    Args:
        task: What is trained.
        variants: In the order of the table.
        options: The user's.
        base: Name of the variant that the others' CPU time is divided by.
        columns: Of the table, before those of the gate.
        predict: Bytes of a step over the wire, of all ranks together.
        setting: Where and how everybody trains.
    """
    task = task.small() if options.quick else task
    wanted = [v for v in variants if v.name == base or not options.peers or v.peer in options.peers]
    present = [v for v in wanted if not v.code or v.code in options.code]
    folder = options.scratch / TASK
    folder.mkdir(parents=True)
    write_task(task, folder)
    expected: dict[tuple[bool, bool], Expected] = {}
    rows: dict[str, Row] = {}
    gates: dict[str, World | None] = {}
    for variant in present:
        kind = _symmetric(variant, task), variant.frozen_text
        if kind not in expected:
            arguments = task, folder, *kind, setting.device
            (expected[kind],) = run_ranks(reference, *arguments, ranks=1, device=setting.device)
        gates[variant.name], row = _pass_gate(variant, task, options, setting, expected[kind])
        if predict is not None and row["status"] == "measured":
            row["predicted_mb"] = predict(variant, task_of(variant, task)) / 1e6
        rows[variant.name] = row
    right = [v for v in present if rows[v.name]["status"] == "measured"]
    rounds = [_time(right, task, options, setting, number) for number in range(options.rounds)]
    for variant in right:
        rows[variant.name] |= _figures([found[variant.name] for found in rounds])
        rows[variant.name]["ratio"] = _ratio(rounds, variant.name, base)
    notes = absent(variant for variant in wanted if variant not in present)
    notes += [f"{row['variant']}: {row['reason']}" for row in rows.values() if "reason" in row]
    raw = {"expected": list(expected.items()), "gates": gates, "rounds": rounds}
    return Result({**columns, **GATE}, list(rows.values()), notes, raw)


def absent(variants: Iterable[Variant]) -> list[str]:
    """How to add those whose code was not given."""
    return [f"{v.name}: not there; add it with --{v.code} PATH ({CODE[v.code]})." for v in variants]


def measure(
    variant: Variant, task: Task, options: Options, setting: Setting, number: int, timed: bool
) -> dict[str, Any]:
    """Train a variant in this world; what this rank saw. Collective."""
    module, _, name = variant.run.partition(":")
    train = getattr(importlib.import_module(module), name)
    warm_up, steps = (setting.warm_up, options.steps) if timed else (0, STEPS)
    meter = Meter(steps=warm_up + steps, warm_up=warm_up, counts=not timed)
    job = Job(
        task=task_of(variant, task),
        folder=options.scratch / TASK,
        options=variant.options,
        symmetric=_symmetric(variant, task),
        frozen_text=variant.frozen_text,
        timed=timed,
        code=options.code.get(variant.code),
        scratch=options.scratch / f"{variant.name} {number}",
        setting=setting,
    )
    train(job, meter)
    return meter.found()


def _pass_gate(
    variant: Variant, task: Task, options: Options, setting: Setting, expected: Expected
) -> tuple[World | None, Row]:
    row: Row = {"variant": variant.name, "peer": variant.peer, **_plain_options(variant)}
    _say(f"gate: {variant.name}")
    try:
        world = _run(variant, task, options, setting, number=-1, timed=False)
    except RankError as error:
        return None, row | {"status": "failed", "reason": str(error)}
    verdict = judge(world, expected, setting)
    row |= {"status": "measured" if verdict.right else "wrong", **verdict._asdict()}
    if not verdict.right:
        return world, row
    rows = {key: sum(rank["rows"].get(key, 0) for rank in world) for key in world[0]["rows"]}
    row |= rows
    if rows.get("real_tokens"):
        row["padding"] = rows["tokens"] / rows["real_tokens"]
    if len(world) > 1:
        row["counted_mb"] = sum(sent_over_gloo(rank["sent"]) for rank in world) / 1e6
    return world, row


def _time(
    variants: Sequence[Variant], task: Task, options: Options, setting: Setting, number: int
) -> dict[str, World]:
    found = {}
    for variant in variants if number % 2 == 0 else reversed(variants):
        _say(f"round {number + 1} of {options.rounds}: {variant.name}")
        found[variant.name] = _run(variant, task, options, setting, number=number, timed=True)
    return found


def _run(
    variant: Variant, task: Task, options: Options, setting: Setting, *, number: int, timed: bool
) -> World:
    ranks = task_of(variant, task).ranks
    arguments = variant, task, options, setting, number, timed
    return run_ranks(measure, *arguments, ranks=ranks, device=setting.device)


def task_of(variant: Variant, task: Task) -> Task:
    """The task on as many ranks as the variant wants."""
    return replace(task, ranks=int(variant.options.get("ranks", task.ranks)))


def _figures(rounds: Sequence[World]) -> Row:
    """Medians over the rounds, of a rank and step; bytes of all ranks together."""
    steps = len(rounds[0][0]["cpu_seconds"])
    row: Row = {
        "cpu_seconds": median(mean(median(r["cpu_seconds"]) for r in world) for world in rounds),
        "seconds": median(s for world in rounds for rank in world for s in rank["seconds"]),
        "peak_mb": median(max(rank["peak_mb"] for rank in world) for world in rounds),
        "whole_mb": median(max(rank["whole_mb"] for rank in world) for world in rounds),
    }
    if "gpu_mb" in rounds[0][0]:
        row["gpu_mb"] = median(max(rank["gpu_mb"] for rank in world) for world in rounds)
    if len(rounds[0]) > 1 and rounds[0][0]["wire_bytes"] is not None:
        row["wire_mb"] = median(world[0]["wire_bytes"] for world in rounds) / steps / 1e6
    return row


def _ratio(rounds: Sequence[Mapping[str, World]], name: str, base: str) -> float | None:
    """Cost against the base's in the same round; ``None``: the base was not measured."""
    if base not in rounds[0]:
        return None
    return median(_cost(found[name]) / _cost(found[base]) for found in rounds)


def _cost(world: World) -> float:
    """Seconds of a rank and step: of the processor, or on the clock where a GPU does the work."""
    key = "seconds" if "gpu_mb" in world[0] else "cpu_seconds"
    return mean(median(rank[key]) for rank in world)


def _symmetric(variant: Variant, task: Task) -> bool:
    return task.symmetric if variant.symmetric is None else variant.symmetric


def _plain_options(variant: Variant) -> Row:
    """For targets: the variant's options, keys of a configuration included."""
    own = dict(variant.options)
    return {**own.pop("keys", {}), **own}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
