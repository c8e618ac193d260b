"""F14, F15: a run goes on at another number of ranks and another ZeRO stage, and its changes take effect."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel, AutoProcessor

from tests.distributed.test_train import ds_file, losses_of, metrics_of
from tests.worlds import World
from vembed_ds import convert

pytestmark = pytest.mark.faults

RUN = "tests.faults.resume_cases:run_and_record"
LISTEN = "tests.faults.resume_cases:run_and_listen"
Make = Callable[..., str]
Worlds = Callable[[int], World]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def plain_clip(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny CLIP without dropout, whose draws depend on the ranks."""
    config = AutoConfig.from_pretrained(clip_folder)
    config.text_config.attention_dropout = config.vision_config.attention_dropout = 0.0
    folder = tmp_path_factory.mktemp("plain-clip")
    AutoModel.from_pretrained(clip_folder, config=config).save_pretrained(folder)
    AutoProcessor.from_pretrained(clip_folder).save_pretrained(folder)
    return str(folder)


def run(world: World, config: str, stage: int | str, **options: Any) -> list[dict[str, Any]]:
    answers = world.run(RUN, config=config, ds_config=ds_file(stage), **options)
    for answer in answers:
        assert "error" not in answer, answer["error"]
    return answers


def batches(answers: list[dict[str, Any]]) -> dict[int, list[int]]:
    """The records of every step's global batch: the ranks' shares in a row."""
    return {
        step: [index for answer in answers for index in answer["steps"][step][0]]
        for step in answers[0]["steps"]
    }


LORA = {"use_lora": True, "lora_dropout": 0.0, "lora_r": 2}
FROZEN = {"freeze_text_encoder": True, "cache_frozen_encoder": False}
AVERAGED = {"teacher_ema_decay": 0.5, "distillation_alpha": 0.5}
STREAM = {"streaming": True, "shuffle_buffer": 5}
# Ranks and stage: of the whole run, and of two more that go on from step 2 and step 4.
WAYS = [
    ((2, 2), (1, 3), (2, 0), {}),
    ((2, 3), (1, 0), (1, 1), LORA),
    ((1, 1), (2, 3), (2, "2_offload"), FROZEN | STREAM),
    ((2, 0), (1, 2), (2, 3), AVERAGED),
]


@pytest.mark.parametrize(("first", "second", "third", "changes"), WAYS)
@pytest.mark.one_in(3)
def test_a_run_goes_on_anywhere(
    world: Worlds,
    make_config: Make,
    plain_clip: str,
    tmp_path: Path,
    first: tuple[int, int | str],
    second: tuple[int, int | str],
    third: tuple[int, int | str],
    changes: dict[str, Any],
) -> None:
    """The file says batch_size as for the first ranks, and is never changed."""
    out = tmp_path / "out"
    config = make_config(
        model_name=plain_clip,
        batch_size=8 // first[0],
        max_steps=6,
        save_steps=2,
        val_data_path=None,
        output_dir=str(out),
        **changes,
    )
    whole = run(world(first[0]), config, first[1])
    expected = losses_of(out)
    (out / "latest").write_text("checkpoint-step-2")
    found = run(world(second[0]), config, second[1], resume="auto")
    assert batches(found) == {step: batches(whole)[step] for step in (2, 3, 4, 5)}
    assert losses_of(out) == pytest.approx(expected, rel=TOLERANCE)
    assert yaml.safe_load((out / "config.yaml").read_text())["training"]["batch_size"] == (
        8 // second[0]
    )
    (out / "latest").write_text("checkpoint-step-4")  # written by the second run
    found = run(world(third[0]), config, third[1], resume="auto")
    assert batches(found) == {step: batches(whole)[step] for step in (4, 5)}
    assert losses_of(out) == pytest.approx(expected, rel=TOLERANCE)
    assert len(set(expected.values())) == 6


def test_the_change_of_place_is_shown(world: Worlds, make_config: Make, tmp_path: Path) -> None:
    config = make_config(max_steps=2, save_steps=1, val_data_path=None)
    run(world(2), config, 2)
    (tmp_path / "out" / "latest").write_text("checkpoint-step-1")
    (answer,) = world(1).run(LISTEN, config=config, ds_config=ds_file(3), resume="auto")
    for line in (
        "batch_size: 4 -> 8 per rank, so that with 1 rank the global batch stays 8",
        "world_size: 2 -> 1 (harmless)",
        "zero_optimization.stage: 2 -> 3 (harmless)",
    ):
        assert line in answer["log"]


@pytest.mark.parametrize(
    "stage", [0, 3, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)]]
)
@pytest.mark.one_in(2)
def test_an_allowed_rate_takes_effect(
    world: Worlds, make_config: Make, tmp_path: Path, stage: int
) -> None:
    """A rate of nearly nothing leaves the weights of the checkpoint where they are."""
    values = {"max_steps": 4, "save_steps": 2, "val_data_path": None, "warmup_ratio": 0.0}
    config = make_config(**values, scheduler_type="linear")
    run(world(2), config, stage)
    out = tmp_path / "out"
    assert [m["train/lr"] for m in metrics_of(out)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    (out / "latest").write_text("checkpoint-step-2")
    other = make_config(**values | {"max_steps": 8}, lr=1e-12, scheduler_type="cosine")
    allowed = ["lr", "num_steps", "scheduler_type"]
    run(world(2), other, stage, resume="auto", allow_change=allowed)
    rates = {m["step"]: m["train/lr"] for m in metrics_of(out)}
    # The new schedule from its third step on: 2 of 8 are done.
    cosine = {step: 1e-12 * (1 + math.cos(math.pi * (step - 1) / 8)) / 2 for step in (3, 8)}
    assert {step: rates[step] for step in (3, 8)} == pytest.approx(cosine)
    for step in (2, 8):
        shutil.rmtree(tmp_path / f"model-{step}", ignore_errors=True)
        checkpoint = str(out / f"checkpoint-step-{step}")
        assert convert.main([checkpoint, str(tmp_path / f"model-{step}")]) == 0
    before, after = (
        AutoModel.from_pretrained(tmp_path / f"model-{step}").state_dict() for step in (2, 8)
    )
    for name, value in before.items():
        assert torch.allclose(after[name], value, rtol=0, atol=1e-9), name


def test_a_log_line_across_a_checkpoint_is_complete(
    world: Worlds, make_config: Make, plain_clip: str, tmp_path: Path
) -> None:
    """Saved behind step 6, between the lines of steps 4 and 8; on the same ranks bit for bit."""
    config = make_config(
        model_name=plain_clip,
        max_steps=8,
        save_steps=6,
        logging_steps=4,
        val_data_path=None,
        **AVERAGED,
    )

    def last_line(ranks: int, **options: Any) -> dict[str, float]:
        run(world(ranks), config, 1, **options)
        timed = ("train/samples_per_second", "train/data_wait_seconds", "perf/")
        line = metrics_of(tmp_path / "out")[-1]
        return {name: value for name, value in line.items() if not name.startswith(timed)}

    whole = last_line(2)
    assert whole["step"] == 8
    assert [name for name in whole if name.startswith("train/loss_")]
    (tmp_path / "out" / "latest").write_text("checkpoint-step-6")
    assert last_line(2, resume="auto") == whole
    (tmp_path / "out" / "latest").write_text("checkpoint-step-6")
    found = last_line(1, resume="auto")
    for name in ("train/loss", "train/loss_task", "train/skipped_steps"):
        assert found[name] == pytest.approx(whole[name], rel=TOLERANCE)
