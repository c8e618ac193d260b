"""vembed-factory's training names on two ranks: its snippets run, and train as plain PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoProcessor, get_scheduler

from tests.distributed import seed_cases as cases
from tests.distributed.conftest import ROOT
from tests.worlds import World

CASE = "tests.distributed.seed_cases:"
WORLD = 2
LR, DECAY = 1e-3, 0.1
# Attention ignores the bias of its keys: its gradient is rounding, which Adam with a small epsilon
# would blow up to a whole step.
EPSILON = 1e-3


def ds_file(stage: int) -> str:
    return str(ROOT / "ds_configs" / f"zero{stage}.json")


@pytest.fixture
def quiet_clip(clip_folder: Path, tmp_path: Path) -> Path:
    """The tiny CLIP without dropout: plain PyTorch draws other random numbers."""
    folder = tmp_path / "clip"
    model = AutoModel.from_pretrained(clip_folder)
    for part in (model.config.text_config, model.config.vision_config):
        part.attention_dropout = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def config(make_config: Callable[..., str], quiet_clip: Path) -> Callable[..., str]:
    def make(**changes: Any) -> str:
        values = {
            "model_name": str(quiet_clip),
            "val_data_path": None,
            "max_steps": None,
            "learnable_temperature": None,
            "loss_bidirectional": None,
            "use_gradient_cache": False,
            "lr": LR,
            "weight_decay": DECAY,
            "adam_epsilon": EPSILON,
            "warmup_steps": 1,
            "batch_size": cases.PAIRS,
        }
        return make_config(**{**values, **changes})

    return make


def plain_update(
    folder: Path, *, sign: float = 1.0, teacher: Path | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """One process, the whole batch, plain PyTorch: AdamW, clipping, cosine with warm-up."""
    model = AutoModel.from_pretrained(folder).train()
    model.logit_scale.requires_grad_(False)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if sum(size > 1 for size in p.shape) >= 2]
    others = [p for p in trained.values() if not any(p is m for m in matrices)]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=LR,
        eps=EPSILON,
    )
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=1, num_training_steps=cases.STEPS
    )
    losses = []
    for step in range(cases.STEPS):
        batch = cases.global_batch(step, pairs=WORLD * cases.PAIRS)
        loss = plain_loss(model, batch, sign=sign)
        if teacher is not None:
            loss = 0.3 * loss + 0.7 * plain_kl(model, AutoModel.from_pretrained(teacher), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return {f"encoder.backbone.{n}": p.detach() for n, p in trained.items()}, losses


def plain_loss(model: Any, batch: dict[str, Tensor], *, sign: float = 1.0) -> Tensor:
    found = similarities(model, batch, sign=sign)
    return functional.cross_entropy(found / 0.05, torch.arange(len(found)))


def plain_kl(model: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        wanted = (similarities(teacher.eval(), batch) / 0.5).softmax(dim=1)
    logs = (similarities(model, batch) / 0.5).log_softmax(dim=1)
    return 0.5**2 * (wanted * (wanted.log() - logs)).sum(dim=1).mean()


def similarities(model: Any, batch: dict[str, Tensor], *, sign: float = 1.0) -> Tensor:
    query = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    positive = model.get_image_features(sign * batch["pos_pixel_values"])
    rows, columns = (
        functional.normalize(getattr(x, "pooler_output", x), dim=-1) for x in (query, positive)
    )
    return rows @ columns.T


def relative_error(before: Any, after: Any, expected: dict[str, Tensor]) -> float:
    assert set(after) == set(expected)
    off = sum(float((after[n] - expected[n]).square().sum()) for n in expected)
    moved = sum(float((expected[n] - before[n]).square().sum()) for n in expected)
    assert moved > 0
    return float((off / moved) ** 0.5)


@pytest.mark.parametrize(("stage", "cached"), [(0, False), (2, False), (3, False), (2, True)])
def test_the_snippets_update_equals_plain_pytorch(
    world: Callable[[int], World],
    config: Callable[..., str],
    quiet_clip: Path,
    stage: int,
    cached: bool,
) -> None:
    changes = {"use_gradient_cache": cached, "gradient_cache_chunk_size": 3}
    results = world(WORLD).run(CASE + "train", config=config(**changes), ds_config=ds_file(stage))
    expected, losses = plain_update(quiet_clip)
    for result in results:
        assert relative_error(result["before"], result["after"], expected) < 1e-5
        assert result["distributed"] == (False, cached, False)
        assert result["warmup_steps"] == 1
        assert result["merged"] == ["image", "text"]  # nothing is drawn: equal items are one row
        assert not result["taught"]
    metrics = results[0]["metrics"]
    logged = [line["train/loss"] for line in metrics if "train/loss" in line]
    assert logged == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("stage", "cached"), [(0, True), (3, False)])
def test_the_snippets_update_with_a_teacher_equals_plain_pytorch(
    world: Callable[[int], World],
    config: Callable[..., str],
    quiet_clip: Path,
    clip_folder: Path,
    tmp_path: Path,
    stage: int,
    cached: bool,
) -> None:
    torch.manual_seed(3)
    AutoModel.from_config(AutoModel.from_pretrained(clip_folder).config).save_pretrained(
        tmp_path / "teacher"
    )
    AutoProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path / "teacher")
    changes = {"use_gradient_cache": cached, "gradient_cache_chunk_size": 3}
    changes |= {"teacher_model_name": str(tmp_path / "teacher")}
    changes |= {"distillation_alpha": 0.3, "distillation_temperature": 0.5}
    results = world(WORLD).run(CASE + "train", config=config(**changes), ds_config=ds_file(stage))
    expected, losses = plain_update(quiet_clip, teacher=tmp_path / "teacher")
    for result in results:
        assert relative_error(result["before"], result["after"], expected) < 1e-5
    logged = [line["train/loss"] for line in results[0]["metrics"] if "train/loss" in line]
    assert logged == pytest.approx(losses, rel=1e-5)


def test_the_validation_loss_is_that_of_all_ranks(
    world: Callable[[int], World], config: Callable[..., str], quiet_clip: Path
) -> None:
    first, second = world(WORLD).run(CASE + "train", config=config(), ds_config=ds_file(3))
    model = AutoModel.from_pretrained(quiet_clip).eval()
    with torch.no_grad():
        batches = [
            cases.global_batch(step, pairs=WORLD * cases.PAIRS)
            for step in range(50, 50 + cases.STEPS)
        ]
        losses = [float(plain_loss(model, batch)) for batch in batches]
    assert first["first_loss"] == second["first_loss"]
    assert first["first_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    evaluated = {m["step"]: m["eval/loss"] for m in first["metrics"] if "eval/loss" in m}
    assert evaluated[0] == pytest.approx(first["first_loss"], rel=1e-6)
    assert evaluated[cases.STEPS] != evaluated[0]  # the weights have moved


def test_an_overridden_step_is_the_one_that_trains(
    world: Callable[[int], World], config: Callable[..., str], quiet_clip: Path
) -> None:
    results = world(WORLD).run(CASE + "train", config=config(), ds_config=ds_file(2), custom=True)
    expected, _ = plain_update(quiet_clip, sign=-1.0)
    for result in results:
        assert result["calls"] == cases.STEPS
        assert relative_error(result["before"], result["after"], expected) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_is_a_plain_folder(
    world: Callable[[int], World],
    config: Callable[..., str],
    clip_folder: Path,
    quiet_clip: Path,
    tmp_path: Path,
    stage: int,
) -> None:
    out = tmp_path / "checkpoints" / "step-1000"
    errors = world(WORLD).run(
        CASE + "save",
        config=config(),
        ds_config=ds_file(stage),
        folder=str(clip_folder),
        out=str(out),
    )
    assert any("exists and is not an empty folder" in str(error) for error in errors)
    assert all(error is not None for error in errors)
    assert (out / "training_state" / "latest").is_file()
    saved, original = (AutoModel.from_pretrained(f).state_dict() for f in (out, quiet_clip))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    assert '"retrieval_mode": "t2i"' in (out / "vembed_config.json").read_text()
    assert (out / "tokenizer.json").is_file()


def test_ranks_with_other_numbers_of_validation_batches_are_told(
    world: Callable[[int], World], config: Callable[..., str]
) -> None:
    errors = world(WORLD).run(CASE + "uneven", config=config(), ds_config=ds_file(0))
    assert errors[0] == errors[1]
    assert "one rank has a batch of 0 pairs where another has 4" in errors[0]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_was_saved_goes_on_as_if_it_had_not_stopped(
    world: Callable[[int], World], config: Callable[..., str], tmp_path: Path, stage: int
) -> None:
    results = world(WORLD).run(
        f"{CASE}resume",
        config=config(),
        ds_config=ds_file(stage),
        out=str(tmp_path / "checkpoint"),
    )
    for result in results:
        assert result["done"] == 2
        for name, value in result["uninterrupted"].items():
            assert torch.equal(result["loaded"][name], result["halfway"][name]), name
            assert torch.equal(result["resumed"][name], value), name
        moved = [
            n for n, v in result["halfway"].items() if not torch.equal(v, result["resumed"][n])
        ]
        assert moved


def test_a_checkpoint_that_one_rank_does_not_see(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    errors = world(2).run(f"{CASE}load_what_one_rank_does_not_see", folder=str(tmp_path))
    expected = f"{tmp_path}/1/training_state/latest: missing; give a folder that save_checkpoint"
    assert all(expected in error for error in errors), errors
