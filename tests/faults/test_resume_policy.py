"""F16, F17: the data or the configuration has changed since the checkpoint was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from tests.distributed.conftest import tiny_config
from tests.distributed.test_train import ds_file, losses_of, metrics_of
from tests.worlds import World
from vembed_ds.checkpointing.frozen import FROZEN_FILE

pytestmark = pytest.mark.faults

RUN = "tests.faults.resume_cases:run_and_listen"
Make = Callable[..., str]
Worlds = Callable[[int], World]


@pytest.fixture(scope="module")
def first_run(
    world: Worlds, clip_folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of four steps with a checkpoint after the second, and its data, in one folder."""
    folder = tmp_path_factory.mktemp("first")
    shutil.copy(pairs, folder / "pairs.jsonl")
    config = {
        "model_name": str(clip_folder),
        "data_path": str(folder / "pairs.jsonl"),
        "image_root": str(pairs.parent),
        "retrieval_mode": "t2i",
        "num_workers": 0,
        "batch_size": 4,
        "max_steps": 4,
        "lr": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "output_dir": str(folder / "out"),
        "report_to": "tensorboard",
        "learnable_temperature": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    for answer in world(2).run(RUN, config=str(folder / "run.yaml"), ds_config=ds_file(2)):
        assert "error" not in answer, answer["error"]
    return folder


@pytest.fixture
def resume(world: Worlds, first_run: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Go on in a copy of that run, after its second step, with changes; answers of both ranks."""
    shutil.copytree(first_run / "out", tmp_path / "out")
    (tmp_path / "out" / "latest").write_text("checkpoint-step-2")
    shutil.copy(first_run / "pairs.jsonl", tmp_path / "pairs.jsonl")

    def go_on(
        *, allow: tuple[str, ...] = (), stage: int = 2, ranks: int = 2, **changes: Any
    ) -> list[dict[str, Any]]:
        values = yaml.safe_load((first_run / "run.yaml").read_text())
        values |= {
            "output_dir": str(tmp_path / "out"),
            "data_path": str(tmp_path / "pairs.jsonl"),
            **changes,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        return world(ranks).run(
            RUN,
            config=str(tmp_path / "run.yaml"),
            ds_config=ds_file(stage),
            resume="auto",
            allow_change=allow,
        )

    return go_on


Resume = Callable[..., list[dict[str, Any]]]


def test_harmless_changes_are_shown_and_change_nothing(
    resume: Resume, first_run: Path, tmp_path: Path
) -> None:
    # The data and the folder have moved as well.
    rank_0, rank_1 = resume(eval_batch_size=2, use_gradient_cache=True, num_workers=1)
    assert "error" not in rank_0
    assert "resuming from" in rank_0["log"]
    assert "eval_batch_size: null -> 2 (harmless)" in rank_0["log"]
    assert "use_gradient_cache: false -> true (harmless)" in rank_0["log"]
    assert f'output_dir: "{first_run}/out" -> "{tmp_path}/out" (harmless)' in rank_0["log"]
    assert losses_of(tmp_path / "out") == pytest.approx(losses_of(first_run / "out"), rel=1e-5)
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3, 4]
    assert rank_1["built"]


def test_dangerous_changes_are_refused_before_a_model_is_built(resume: Resume) -> None:
    for answer in resume(lr=5e-6, seed=7, batch_size=2, max_seq_length=8, logging_steps=3):
        text = answer["error"]
        assert text.startswith("CheckpointError: ")
        for line in (
            "checkpoint-step-2: this is not the run that wrote it:",
            "  lr: 0.001 -> 5e-06\n",
            "  seed: 42 -> 7\n",
            "  max_seq_length: null -> 8\n",
            "  global_batch_size: 8 -> 4 (batch_size x ranks)\n",
            "  logging_steps: 1 -> 3 (harmless)\n",
            "--allow_change global_batch_size lr max_seq_length seed",
        ):
            assert line in text, text
        assert not answer["built"]


def test_other_parameters_are_refused_even_if_they_are_named(resume: Resume) -> None:
    for answer in resume(freeze_text_encoder=True, lr=1.0, allow=("freeze_text_encoder", "lr")):
        assert "freeze_text_encoder: false -> true (cannot change: " in answer["error"]
        assert "lr: 0.001 -> 1.0 (by --allow_change)" in answer["error"]
        assert "vembed-ds convert" in answer["error"]
        assert not answer["built"]


def test_a_model_that_moved_and_another_one(
    resume: Resume, clip_folder: Path, first_run: Path, tmp_path: Path
) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(clip_folder, moved)
    for answer in resume(model_name=str(moved)):
        assert "(allow it where it is the same model in another place)" in answer["error"]
        assert answer["error"].endswith("--allow_change model_name")
        assert not answer["built"]
    config = AutoConfig.from_pretrained(clip_folder)
    config.projection_dim += 2
    shutil.copytree(clip_folder, other)
    AutoModel.from_config(config).save_pretrained(other)
    for answer in resume(model_name=str(other), allow=("model_name",)):
        assert "is of another model: " in answer["error"]
        assert "text_projection" in answer["error"]
    for answer in resume(model_name=str(moved), allow=("model_name",)):
        assert "error" not in answer
    assert losses_of(tmp_path / "out") == losses_of(first_run / "out")


def run_with(
    world: Worlds, pairs: Path, folder: Path, *, resume: str | None = None, **values: Any
) -> list[dict[str, Any]]:
    """Four steps on two ranks at ZeRO-2 in ``folder/out``, a checkpoint after the second."""
    config = tiny_config(
        folder,
        model=folder / "base",
        pairs=pairs,
        save_steps=2,
        val_data_path=None,
        **values,
    )
    return world(2).run(RUN, config=config, ds_config=ds_file(2), resume=resume)


@pytest.mark.parametrize(
    ("precision", "settings", "changed"),
    [
        ("fp32", {"use_lora": True}, "vision_model.embeddings.patch_embedding.weight"),
        ("bf16", {"freeze_text_encoder": True}, "text_model.embeddings.token_embedding.weight"),
    ],
    ids=["adapters", "stored features"],
)
def test_frozen_weights_that_changed_under_their_name(
    world: Worlds,
    clip_folder: Path,
    pairs: Path,
    tmp_path: Path,
    precision: str,
    settings: dict[str, Any],
    changed: str,
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(clip_folder, base)
    weights = load_file(base / "model.safetensors")
    for answer in run_with(world, pairs, tmp_path, precision=precision, **settings):
        assert "error" not in answer, answer["error"]
    losses = losses_of(out)
    (out / "latest").write_text("checkpoint-step-2")
    kept = out / "checkpoint-step-2" / "model" / FROZEN_FILE
    before = kept.read_bytes() if precision == "bf16" else b""

    edited = {name: tensor.clone() for name, tensor in weights.items()}
    edited[changed].view(-1)[0] += 1e-6  # in bf16 the engine would not see it
    assert not torch.equal(edited[changed], weights[changed])
    save_file(edited, base / "model.safetensors", metadata={"format": "pt"})
    answers = run_with(world, pairs, tmp_path, precision=precision, resume="auto", **settings)
    for answer in answers:
        assert (
            "checkpoint-step-2: the base model is not the one that this was trained on"
            in (answer["error"])
        )
        assert f"model_name='{base}' has other weights now in 1 of" in answer["error"]
        assert changed.removesuffix(".weight") in answer["error"]
        assert "vembed-ds convert" in answer["error"]

    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for answer in run_with(world, pairs, tmp_path, precision=precision, resume="auto", **settings):
        assert "error" not in answer, answer["error"]
    assert losses_of(out) == losses
    if before:
        assert kept.read_bytes() == before
        assert (out / "checkpoint-step-4" / "model" / FROZEN_FILE).read_bytes() == before


def test_a_name_that_no_setting_has(resume: Resume) -> None:
    for answer in resume(allow=("learning",)):
        assert answer["error"].startswith("ConfigError: --allow_change learning: there is no such")


@pytest.mark.parametrize("change", ["edited", "reordered", "longer"])
def test_other_data_is_refused(resume: Resume, tmp_path: Path, change: str) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = path.read_text().splitlines()
    if change == "edited":
        lines[5] = lines[5].replace("bright", "BRIGHT")
    elif change == "reordered":
        lines[5], lines[6] = lines[6], lines[5]
    else:
        lines.append(json.dumps({"query": "one more", "positive": "0.png"}))
    path.write_text("\n".join(lines) + "\n")
    for answer in resume():
        assert "(the contents or the order of the records)\n" in answer["error"]
        assert ("num_records: 24 -> 25\n" in answer["error"]) == (change == "longer")
        longer = " num_records" if change == "longer" else ""
        assert answer["error"].endswith(f"--allow_change data_fingerprint{longer}")
    if change == "edited":
        (rank_0, _) = resume(allow=("data_fingerprint", "seed"))
        assert "error" not in rank_0
        assert "--allow_change seed: it has not changed" in rank_0["log"]
        assert list(losses_of(tmp_path / "out")) == [1, 2, 3, 4]


def test_a_finished_run_builds_no_model(resume: Resume, tmp_path: Path) -> None:
    (tmp_path / "out" / "latest").write_text("checkpoint-step-4")
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    for answer in resume():
        assert answer["metrics"] == {}
        assert not answer["built"]
        assert "the run is complete, nothing is left to train" in answer["log"]
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before
