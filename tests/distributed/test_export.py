"""I4: the converted model is the trained model, whatever ZeRO stage and precision trained it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from tests.checkpoints import load_consolidated
from tests.distributed import export_cases as cases
from tests.parity.conftest import ds_config
from tests.worlds import World
from vembed_ds import Encoder
from vembed_ds.checkpointing.export import export_model
from vembed_ds.checkpointing.files import resolve_checkpoint
from vembed_ds.checkpointing.planning import Options
from vembed_ds.checkpointing.verifying import require_equal, verify_export

STAGES = [0, 1, 2, 3]
TOLERANCE = 1e-6  # absolute, on unit vectors

pytestmark = [pytest.mark.distributed(2)]


def slow(*values: Any) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    cases.save_backbones(folder)
    return folder


@pytest.fixture
def train(
    world: Callable[[int], World], backbones: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """``train(kind, stage, precision)``: rank 0's result; the checkpoint is in ``run``."""

    def run(
        kind: str, stage: int, precision: str = "fp32", zero: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        result: dict[str, Any] = world(2).run(
            "tests.distributed.export_cases:train_and_save",
            folder=str(backbones),
            kind=kind,
            ds_config=ds_config(stage, 2, precision=precision, zero=zero),
            out=str(tmp_path / "run"),
        )[0]
        return result

    return run


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.one_in(3)
def test_embeddings(train: Callable[..., Any], tmp_path: Path, kind: str, stage: int) -> None:
    trained = train(kind, stage)
    export_model(tmp_path / "run", tmp_path / "out")
    encoder = Encoder(tmp_path / "out", device="cpu")
    plain = PLAIN[kind](tmp_path / "out")
    assert set(trained["after"]) == set(plain) == set(encoder.model.parts)
    for stream, expected in trained["after"].items():
        assert np.abs(expected - trained["before"][stream]).max() > 1e-3, "nothing was trained"
        got = (
            encoder.encode_text(cases.TEXTS, batch_size=2)
            if stream == "text"
            else encoder.encode_image(cases.images(), batch_size=2)
        )
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
        by_hand = functional.normalize(plain[stream], dim=1).numpy()
        np.testing.assert_allclose(by_hand, expected, rtol=0, atol=TOLERANCE)
    check_verified(tmp_path)


@pytest.mark.parametrize("stage", [0, 3, *slow(1, 2)])
@pytest.mark.parametrize("dtype", ["float32", *slow("bfloat16")])
def test_late_interaction(
    train: Callable[..., Any], tmp_path: Path, stage: int, dtype: str
) -> None:
    trained = train("late", stage)["after"]["text"]
    export_model(tmp_path / "run", tmp_path / "out", dtype=dtype)
    if dtype == "float32":
        rows = Encoder(tmp_path / "out", device="cpu").encode_text(cases.TEXTS, batch_size=2)
        for got, expected in zip(rows, trained, strict=True):
            assert got.shape[1:] == (7,)
            np.testing.assert_allclose(got, expected[: len(got)], rtol=0, atol=TOLERANCE)
    check_verified(tmp_path, dtype=dtype)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [*slow(*cases.KINDS)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_formats(
    train: Callable[..., Any], tmp_path: Path, kind: str, stage: int, dtype: str
) -> None:
    train(kind, stage)
    export_model(tmp_path / "run", tmp_path / "out", dtype=dtype)
    check_verified(tmp_path, dtype=dtype)


def check_verified(tmp_path: Path, **options: Any) -> None:
    """By this package and by sentence-transformers."""
    checkpoint = resolve_checkpoint(tmp_path / "run")
    found = verify_export(checkpoint, tmp_path / "out", Options(**options))
    assert len(found) == 2
    require_equal(found, tmp_path / "out")
    if options.get("dtype", "float32") == "float32":  # the limit of merged adapters is wider
        assert all(one.difference <= TOLERANCE for one in found), found


def check_weights(state: dict[str, torch.Tensor], trained: dict[str, Any]) -> None:
    """Against the engine's masters, and against what its forward pass used.

    DeepSpeed finds a master by the same table that its checkpoint holds, so that a wrong table
    would give equal values; the forward pass knows no table.
    """
    assert set(state) == set(trained["weights"])
    for name, expected in trained["weights"].items():
        assert state[name].dtype == expected.dtype, name
        assert torch.equal(state[name], expected), name
    for name, held in trained["held"].items():
        assert torch.equal(state[name].to(held.dtype), held), name


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("resnet", "fp32"),  # its persistent buffers are float32 and int64
        ("composed", "bf16"),
        ("tied", "fp32"),
        ("tied", "bf16"),
        ("tied", "fp16"),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.one_in(3)
def test_consolidated_weights(
    train: Callable[..., Any], tmp_path: Path, kind: str, precision: str, stage: int
) -> None:
    trained = train(kind, stage, precision)
    state = load_consolidated(tmp_path / "run" / "checkpoint-step-2")
    check_weights(state, trained)
    if precision != "fp32":
        trained_names = [n for n, t in state.items() if (t != t.bfloat16().float()).any()]
        assert len(trained_names) > 10, "masters must hold more digits than 16 bit"
    if kind == "tied":
        layer = "encoder.towers.text.backbone.encoder.layer.{}.output.dense.weight"
        assert state[layer.format(0)] is state[layer.format(1)]


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (1, {"offload_optimizer": {"device": "cpu"}}),
        (2, {"offload_optimizer": {"device": "cpu"}}),
        (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        (3, {"sub_group_size": 500}),
    ],
)
def test_other_layouts_of_the_shards(
    train: Callable[..., Any], tmp_path: Path, stage: int, zero: dict[str, Any]
) -> None:
    trained = train("tied", stage, "bf16", zero)
    check_weights(load_consolidated(tmp_path / "run"), trained)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.one_in(3)
def test_masters_are_exported(
    train: Callable[..., Any], tmp_path: Path, precision: str, stage: int
) -> None:
    trained = train("clip", stage, precision)["weights"]
    export_model(tmp_path / "run", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported["logit_scale"].shape == ()
    assert float(exported["logit_scale"]) == float(trained.pop("logit_scale"))
    assert set(exported) - {"logit_scale"} == {n.removeprefix("encoder.backbone.") for n in trained}
    for name, expected in trained.items():
        tensor = exported[name.removeprefix("encoder.backbone.")]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected), name


def test_settings_of_a_composed_encoder(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train("composed", 3)
    export_model(tmp_path / "run", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "vembed_config.json").read_text())
    assert settings.pop("logit_scale") == float(trained["weights"]["logit_scale"])
    assert settings == {
        "retrieval_mode": "t2i",
        "temperature": 0.1,
        "image_root": None,
        "dtype": "float32",
        "format_version": 1,
        "encoder_mode": "composed",
        "streams": ["text", "image"],
        "topk_tokens": 0,
        "backbones": {s: {"width": 18, "own_pooler": "vector"} for s in ("text", "image")},
        "image_inputs": ["pixel_values"],
        "pooling": {"text": "mean", "image": "cls"},
        "pooling_method": "mean",
        "projections": {
            "text_projection": {"layers": 2, "shape": [11, 18]},
            "image_projection": {"layers": 2, "shape": [11, 18]},
        },
        "projection_dim": 11,
        "projection_layers": 2,
        "max_seq_length": cases.MAX_LENGTH,
        "pad_to_max_length": False,
    }


def tokens_of(folder: Path) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(cases.TEXTS, padding=True, truncation=True, return_tensors="pt"))


def pixels_of(folder: Path) -> Tensor:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels: Tensor = processor(
        cases.images(), input_data_format="channels_last", return_tensors="pt"
    )["pixel_values"]
    return pixels


def mean_pooled(folder: Path, tokens: dict[str, Tensor]) -> Tensor:
    hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).float()
    return (hidden * mask).sum(1) / mask.sum(1)


def projected(path: Path, rows: Tensor) -> Tensor:
    weights = load_file(path)
    hidden = functional.gelu(functional.linear(rows, weights["0.weight"], weights["0.bias"]))
    return functional.linear(hidden, weights["2.weight"])


@torch.no_grad()
def plain_shared(folder: Path) -> dict[str, Tensor]:
    return {"text": mean_pooled(folder, tokens_of(folder))}


@torch.no_grad()
def plain_clip(folder: Path) -> dict[str, Tensor]:
    model = AutoModel.from_pretrained(folder).eval()
    tokens = {k: v for k, v in tokens_of(folder).items() if k != "token_type_ids"}
    return {
        "text": model.get_text_features(**tokens).pooler_output,
        "image": model.get_image_features(pixel_values=pixels_of(folder)).pooler_output,
    }


@torch.no_grad()
def plain_composed(folder: Path) -> dict[str, Tensor]:
    text, image = folder / "text_encoder", folder / "image_encoder"
    rows = mean_pooled(text, tokens_of(folder))
    hidden = AutoModel.from_pretrained(image).eval()(pixels_of(folder)).last_hidden_state
    return {
        "text": projected(folder / "text_projection.safetensors", rows),
        "image": projected(folder / "image_projection.safetensors", hidden[:, 0]),
    }


@torch.no_grad()
def plain_convolutional(folder: Path) -> dict[str, Tensor]:
    model = AutoModel.from_pretrained(folder).eval()
    return {"image": model(pixels_of(folder)).pooler_output.flatten(1)}


PLAIN: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "shared": plain_shared,
    "gpt2": plain_shared,
    "clip": plain_clip,
    "composed": plain_composed,
    "convnext": plain_convolutional,
    "resnet": plain_convolutional,
}
