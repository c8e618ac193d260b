"""What teachers cost: step time, bytes sent and memory, against no teacher, in one run.

``python -m benchmarks.distillation [--ranks 2] [--steps 8] [--rounds 3]``: a student of 4.3 million
parameters follows all-MiniLM-L6 (22.7 million) through the project's own training loop. In every
round each variant trains in a world of its own, in turn, from the same weights on the same batches.
Loss and gradient norm of the first step are the gate: a variant that differs from plain PyTorch in
float64 gets no figures. In a network of its own (``unshare -rn sh -c "ip link set lo up; ..."``)
what went over the wire is read beside what was counted. docs/benchmark_distillation.md has figures.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.distillation_plain import (
    ALPHA,
    TEACHER,
    TEMPERATURE,
    Size,
    plain_step,
    size_of,
    write_inputs,
)
from benchmarks.distillation_report import ALONE, summarize, table
from benchmarks.measuring import memory, reset_peak, run_ranks
from benchmarks.peers import ours
from benchmarks.traffic import CountedTraffic, loopback_bytes
from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import Config
from vembed_ds.data.collators import Batch
from vembed_ds.distributed import comm
from vembed_ds.engine.teacher_engine import TeacherEngine
from vembed_ds.training.loop import TrainingLoop

BATCH_SIZE, CHUNK_SIZE = 32, 8  # pairs of a rank; items of a chunk
ITEMS = 2 * BATCH_SIZE
FOLLOW = {"distillation_alpha": ALPHA, "distillation_temperature": TEMPERATURE}
LIVE = {**FOLLOW, "teacher_model_name": TEACHER}
VARIANTS: dict[str, dict[str, Any]] = {
    ALONE: {},
    "live": LIVE,
    "live, one forward": {**LIVE, "eval_batch_size": ITEMS},
    "live, offloaded": {**LIVE, "teacher_ds_config": "offloaded.json"},
    "live, hpZ": {**LIVE, "teacher_ds_config": "hpz.json"},
    "two live": {
        **FOLLOW,
        "teachers": [{"model_name": TEACHER, "name": name} for name in ("first", "second")],
    },
    "cached": {**LIVE, "teacher_mode": "cached"},
    "first epoch": {**LIVE, "teacher_mode": "first_epoch"},
    "EMA": {**FOLLOW, "teacher_ema_decay": 0.999},
}
FOLLOWED = {ALONE: None, "EMA": "student"}  # the others: the teacher
HPZ = 2  # ranks that share a second set of shards


def main() -> None:
    arguments = _parse()
    # Read when a rank imports its libraries.
    os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        num_pairs = arguments.ranks * BATCH_SIZE * arguments.steps
        texts = write_inputs(folder, num_pairs=num_pairs, hpz=HPZ)
        sizes = {model: size_of(folder, model) for model in ("student", "teacher")}
        rounds = [
            {
                name: run_ranks(measure, name, folder, number, arguments, ranks=arguments.ranks)
                for name in arguments.variants
            }
            for number in range(arguments.rounds)
        ]
        batch = [texts[i] for rank in rounds[0][ALONE] for i in rank["indices"]]
        expected = {model: plain_step(folder, batch, model) for model in (None, *sizes)}
    rows = [
        summarize(
            name,
            rounds,
            expected=expected[FOLLOWED.get(name, "teacher")],
            predicted_bytes=predict_bytes(name, ranks=arguments.ranks, **sizes),
        )
        for name in arguments.variants
    ]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "rounds": rounds}, indent=1))


def predict_bytes(name: str, *, ranks: int, student: Size, teacher: Size) -> float:
    """What a rank sends in a step for the sake of its teachers.

    A sharded teacher is gathered once for each of its forward passes, and the loss gathers what
    each teacher, cached ones too, says of the positives. Of a tensor that is gathered, a rank of a
    ring sends ``(N - 1) / N``; with hpZ, N are the ranks that share its second shards.

    Args:
        name: The variant.
        ranks: Size of the world.
        student: The EMA teacher's size.
        teacher: The others'.
    """
    chunks = ITEMS // CHUNK_SIZE
    number = {ALONE: 0, "two live": 2}.get(name, 1)
    forwards = {"cached": 0, "live, one forward": 1}.get(name, chunks)
    group = HPZ if name == "live, hpZ" else ranks
    size = student if name == "EMA" else teacher
    weights = forwards * size.parameters * (group - 1) / group
    vectors = BATCH_SIZE * size.width * (ranks - 1)
    return number * 4 * (weights + vectors)


def measure(
    name: str, folder: Path, round_number: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train a variant in this world; what this rank saw. Collective."""
    before = reset_peak()
    config = configure(name, folder, output=folder / f"{name} {round_number}")
    loop, _, preparation = ours.build(config, stage=arguments.stage)
    batches = loop.batches()
    first = take_step(loop, batches)
    with CountedTraffic() as traffic:
        take_step(loop, batches)
    reset_peak()
    comm.barrier()
    sent = loopback_bytes()
    timed = [take_step(loop, batches) for _ in range(arguments.steps - 2)]
    comm.barrier()
    return {
        **first,
        **preparation,
        "steps": timed,
        "counted_bytes": dict(traffic.sent),
        "wire_bytes": None if sent is None else (loopback_bytes() or 0) - sent,
        "peak_mb": (memory("VmHWM") - before) / 1024,
        "resident": [teacher.residence()._asdict() for teacher in _models(loop)],
    }


def configure(name: str, folder: Path, *, output: Path, epochs: int = 1) -> Config:
    """A variant's configuration, as a run would have it."""
    settings = {
        "model_name": str(folder / "student"),
        "pooling_method": "mean",
        "data_path": str(folder / "pairs.jsonl"),
        "retrieval_mode": "t2t",
        "num_workers": 0,
        "batch_size": BATCH_SIZE,
        "use_gradient_cache": True,
        "gradient_cache_chunk_size": CHUNK_SIZE,
        "temperature": TEMPERATURE,
        "loss_bidirectional": False,
        "lr": 1e-4,
        "max_grad_norm": 0.0,
        "epochs": epochs,
        "report_to": "none",
        "output_dir": str(output),
        **VARIANTS[name],
    }
    if "teacher_ds_config" in settings:
        settings["teacher_ds_config"] = str(folder / settings["teacher_ds_config"])
    return parse_config(settings)


def take_step(loop: TrainingLoop, batches: Iterator[Batch]) -> dict[str, Any]:
    """One step as the loop takes it, from the texts on."""
    embed = TeacherEngine.embed  # of any teacher, also of one that is let go of in this step
    with patch.object(TeacherEngine, "embed", autospec=True, side_effect=embed) as counted:
        started, cpu = time.perf_counter(), time.process_time()
        batch = next(batches)
        result = loop.compute_gradient(batch)
        norm = loop.engine.step()
        loop.step += 1
        loop.teachers.after_step(loop.step, updated=norm is not None)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
        "forwards": counted.call_count,
        "loss": float(comm.mean_over_ranks(result.loss)),
        "grad_norm": float(norm) if norm is not None else None,
        "indices": batch.indices,
    }


def _models(loop: TrainingLoop) -> list[Any]:
    """The teachers that are models now."""
    found = (getattr(source, "teacher", None) for source in loop.teachers.sources.values())
    return [teacher for teacher in found if teacher is not None]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="CPU processes of a world")
    parser.add_argument(
        "--steps", type=int, default=8, help="per round; the first two are not timed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="worlds per variant")
    parser.add_argument(
        "--stage", type=int, default=2, choices=range(4), help="ZeRO, the student's"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="beside no teacher")
    parser.add_argument("--json", type=Path, help="file for the same figures, and all of them")
    arguments = parser.parse_args()
    if arguments.steps < 3:
        parser.error(f"--steps {arguments.steps}: the first two are not timed; take 3 or more")
    # hpZ over the whole world would send as much as without, from twice the memory.
    pointless = arguments.ranks % HPZ or arguments.ranks == HPZ
    chosen = arguments.variants or [n for n in VARIANTS if not (n == "live, hpZ" and pointless)]
    if "live, hpZ" in chosen and pointless:
        parser.error(f"live, hpZ: groups of {HPZ} need 4, 6, ... ranks; set --ranks 4")
    arguments.variants = [ALONE, *(name for name in chosen if name != ALONE)]
    return arguments


if __name__ == "__main__":
    main()
