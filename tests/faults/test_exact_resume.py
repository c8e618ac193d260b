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
    (0, "fp32", 2, "table", CACHED),
    (1, "fp16", 0, "stream", PLAIN),
    (2, "bf16", 2, "mixture", CACHED),
    (3, "fp32", 0, "mixture", CACHED | AVERAGED),
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
    last = f"checkpoint-step-{STEPS}"
    files = sorted(path.name for path in (whole / last).glob("*.pt"))
    assert len(files) >= 3
    for file in files:
        assert_same(load(whole / last / file), load(gone_on / last / file), file)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def assert_same(a: Any, b: Any, place: str) -> None:
    """Equal bit for bit, whatever is in what."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            assert_same(a[key], b[key], f"{place}: {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}: {number}")
    elif hasattr(a, "__dict__"):
        assert type(a) is type(b), place
        assert_same(vars(a), vars(b), place)
    else:
        assert a == b, place
