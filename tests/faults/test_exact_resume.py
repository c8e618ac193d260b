"""F13: a run that goes on from the middle of an epoch is the run that was never interrupted.

Saved at step 7 of 20, with dropout: batches, random generators, losses, and at the end weights, optimizer,
schedule and loss scale, all bit for bit.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_train import ds_file, losses_of, metrics_of
from tests.worlds import World
from vembed_ds.checkpointing.layouts import WEIGHT
from vembed_ds.checkpointing.shards import open_checkpoint

pytestmark = pytest.mark.faults

RUN = "tests.faults.resume_cases:run_and_record"
STEPS, SAVED = 20, 7  # an epoch has three steps, of a mixture fewer
AUGMENTED = [{"RandomHorizontalFlip": {"p": 0.5}}]
CACHED = {"use_gradient_cache": True, "gradient_cache_chunk_size": 3}
PLAIN = {"use_gradient_cache": False, "gradient_cache_chunk_size": None}
AVERAGED = {
    "teacher_ema_decay": 0.5,
    "distillation_alpha": 0.9,
    "distillation_alpha_end": 0.1,
    "distillation_alpha_schedule": "linear",
}


@pytest.fixture
def datas(pairs: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What a run may read: one data set, several that differ in everything, a stream."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["negatives"] = [rows[number - 1]["positive"], rows[number - 2]["positive"]]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    mixture = [
        {"name": "a", "data_path": str(pairs), "weight": 0.7},
        {"name": "b", "data_path": str(tmp_path / "b.jsonl"), "weight": 2.0},
    ]
    drawn = {"image_augmentation": AUGMENTED}
    return {
        "table": drawn,
        "mixture": {
            **drawn,
            "data_path": None,
            "datasets": mixture,
            "batching": "homogeneous",
            "max_negatives": 1,
        },
        "stream": {**drawn, "streaming": True, "shuffle_buffer": 5},
    }


CASES = [
    # stage, precision, workers, data, step
    (3, "fp32", 0, "mixture", CACHED | AVERAGED),
    (0, "fp32", 2, "table", CACHED),
    (1, "fp16", 0, "stream", PLAIN),
    (2, "bf16", 2, "mixture", CACHED),
]


def more_cases() -> list[Any]:
    """Every stage with every kind of loading and step, and with every precision and data."""
    stages, precisions, datas = (
        (0, 1, 2, 3),
        ("fp32", "bf16", "fp16"),
        ("table", "mixture", "stream"),
    )
    found = [
        (stage, "fp32", workers, "table", step)
        for stage, workers, step in itertools.product(stages, (0, 2), (PLAIN, CACHED))
    ]
    for number, (stage, precision, data) in enumerate(itertools.product(stages, precisions, datas)):
        found.append((stage, precision, number % 2 * 2, data, CACHED if number % 3 else PLAIN))
    refused = (0, "fp16")
    return [
        pytest.param(*case, marks=pytest.mark.slow)
        for number, case in enumerate(found)
        if case[:2] != refused and case not in CASES and case not in found[:number]
    ]


def name(value: Any) -> str:
    if isinstance(value, dict):
        return "averaged" if value.keys() & AVERAGED else "cached" if value == CACHED else "plain"
    return str(value)


@pytest.mark.parametrize(
    ("stage", "precision", "workers", "data", "step"), [*CASES, *more_cases()], ids=name
)
@pytest.mark.one_in(2)
def test_a_resumed_run_is_the_uninterrupted_run(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    datas: dict[str, dict[str, Any]],
    tmp_path: Path,
    stage: int,
    precision: str,
    workers: int,
    data: str,
    step: dict[str, Any],
) -> None:
    pytest.importorskip("kornia")

    def run(out: Path, **options: Any) -> list[dict[str, Any]]:
        config = make_config(
            **datas[data],
            **step,
            precision=precision,
            num_workers=workers,
            output_dir=str(out),
            max_steps=STEPS,
            save_steps=SAVED,
            val_data_path=None,
            gradient_self_test=stage == 3,  # leaves no trace either
            report_to="none",
        )
        fp16 = True if precision == "fp16" else None
        answers = world(2).run(
            RUN, config=config, ds_config=ds_file(stage), fp16_supported=fp16, **options
        )
        for answer in answers:
            assert "error" not in answer, answer["error"]
        return answers

    whole, gone_on = tmp_path / "whole", tmp_path / "gone-on"
    expected = run(whole)
    (whole / "latest").write_text(f"checkpoint-step-{SAVED}")
    shutil.copytree(whole, gone_on, ignore=shutil.ignore_patterns("checkpoint-step-14", "*-20"))
    found = run(gone_on, resume="auto")

    for before, after in zip(expected, found, strict=True):
        assert list(after["steps"]) == list(range(SAVED, STEPS))
        assert after["steps"] == {n: before["steps"][n] for n in after["steps"]}
    assert [line["step"] for line in metrics_of(gone_on)] == list(range(1, STEPS + 1))
    assert losses_of(gone_on) == losses_of(whole)
    assert len(set(losses_of(whole).values())) == STEPS
    assert_same_state(whole / f"checkpoint-step-{STEPS}", gone_on / f"checkpoint-step-{STEPS}")


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule, counters, loss scale, averages, generators: bit for bit.

    By parameter: what pads the pieces of ZeRO-3 to equal length is nobody's, and is anything.
    """
    a, b = open_checkpoint(one), open_checkpoint(other)
    assert a.names() == b.names()
    assert (a.optimizer.kinds, a.optimizer.step) == (b.optimizer.kinds, b.optimizer.step)
    for name in a.trained:
        for kind in (WEIGHT, *a.optimizer.kinds):
            size = a.shape(name).numel()
            values = [found.read(name, kind, 0, size) for found in (a, b)]
            assert torch.equal(*values), f"{name}, {kind}"
    for what in ("counters", "schedule", "loss_scaler"):
        assert getattr(a, what) == getattr(b, what), what
    for pattern in ("random_state_rank_*.pt", "ema_teacher_rank_*.safetensors"):
        for file in one.glob(pattern):
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name
    assert len(list(one.glob("random_state_rank_*.pt"))) == 2
