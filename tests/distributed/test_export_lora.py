"""I4 with adapters: merged or as peft's files, the export is the trained model at every stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModel

from tests.distributed import export_cases as cases
from tests.distributed.test_export import (
    PLAIN,
    TOLERANCE,
    check_verified,
    pixels_of,
    slow,
    tokens_of,
)
from tests.parity.conftest import ds_config
from tests.worlds import World
from vembed_ds import Encoder
from vembed_ds.checkpointing.export import export_model
from vembed_ds.errors import CheckpointError

RANK = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}
FOUR_BIT = {"load_in_4bit": True}

pytestmark = [pytest.mark.distributed(2)]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    cases.save_backbones(folder)
    return folder


@pytest.fixture
def train(
    world: Callable[[int], World], backbones: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """``train(kind, stage, variant)``: rank 0's result; the checkpoint is in ``run``."""

    def run(kind: str, stage: int, variant: str = "lora", **options: Any) -> dict[str, Any]:
        lora = {"r": RANK, "alpha": 6.0, "dropout": 0.1, **VARIANTS[variant], **options}
        result: dict[str, Any] = world(2).run(
            "tests.distributed.export_cases:train_and_save",
            folder=str(backbones),
            kind=kind,
            ds_config=ds_config(stage, 2),
            out=str(tmp_path / "run"),
            steps=3,
            lora=lora,
        )[0]
        return result

    return run


def check_encoder(folder: Path, trained: dict[str, Any]) -> None:
    encoder = Encoder(folder, device="cpu")
    assert set(trained["after"]) == set(encoder.model.parts)
    for stream, expected in trained["after"].items():
        got = (
            encoder.encode_text(cases.TEXTS)
            if stream == "text"
            else encoder.encode_image(cases.images())
        )
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def check_moved(trained: dict[str, Any]) -> None:
    for stream, rows in trained["after"].items():
        assert np.abs(rows - trained["before"][stream]).max() > 1e-3, "nothing was trained"


@pytest.mark.parametrize(
    ("kind", "variant", "stage"),
    [
        *[(kind, "lora", stage) for kind in ("shared", "clip") for stage in (0, 1, 2, 3)],
        *[("composed", "dora", stage) for stage in (0, 2, 3)],
        pytest.param("composed", "lora", 1, marks=pytest.mark.slow),
        ("clip", "dora", 3),
        ("shared", "rslora", 3),
        *[("gpt2", variant, stage) for variant in ("lora", "dora") for stage in (0, 3)],
    ],
)
@pytest.mark.one_in(3)
def test_merged(
    train: Callable[..., Any], tmp_path: Path, kind: str, variant: str, stage: int
) -> None:
    trained = train(kind, stage, variant)
    check_moved(trained)
    export_model(tmp_path / "run", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("adapter_*"))
    check_encoder(tmp_path / "out", trained)
    for stream, rows in PLAIN[kind](tmp_path / "out").items():  # transformers alone
        by_hand = functional.normalize(rows, dim=1).numpy()
        np.testing.assert_allclose(by_hand, trained["after"][stream], rtol=0, atol=TOLERANCE)
    check_verified(tmp_path)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.one_in(2)
def test_4_bit_is_merged_as_it_was_trained(
    train: Callable[..., Any], tmp_path: Path, stage: int
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `qlora`")
    trained = train("shared", stage, **FOUR_BIT)
    check_moved(trained)
    with pytest.raises(
        CheckpointError, match=r"was trained with load_in_4bit, .* leave out --adapter"
    ):
        export_model(tmp_path / "run", tmp_path / "out", adapter=True)
    export_model(tmp_path / "run", tmp_path / "out")
    check_encoder(tmp_path / "out", trained)


# peft's own reading of the files asks transformers 5.23 by a name that is going away.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.one_in(2)
def test_adapter_files(
    train: Callable[..., Any], backbones: Path, tmp_path: Path, variant: str, stage: int
) -> None:
    trained = train("clip", stage, variant, modules_to_save=["visual_projection"])
    check_moved(trained)
    out = tmp_path / "out"
    export_model(tmp_path / "run", out, adapter=True)
    assert not {"config.json", "model.safetensors"} & {path.name for path in out.iterdir()}
    check_encoder(out, trained)
    check_shapes(out / "adapter_model.safetensors", backbones / "clip", variant)
    settings = json.loads((out / "vembed_config.json").read_text())
    assert settings["logit_scale"] == float(trained["weights"]["logit_scale"])
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(backbones / "clip"), out).eval()
    tokens = {k: v for k, v in tokens_of(out).items() if k != "token_type_ids"}
    with torch.no_grad():
        rows = {
            "text": adapted.get_text_features(**tokens).pooler_output,
            "image": adapted.get_image_features(pixel_values=pixels_of(out)).pooler_output,
        }
    for stream, expected in trained["after"].items():
        by_hand = functional.normalize(rows[stream], dim=1).numpy()
        np.testing.assert_allclose(by_hand, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_adapter_files_of_transposed_layers(
    train: Callable[..., Any], backbones: Path, tmp_path: Path, variant: str
) -> None:
    trained = train("gpt2", 3, variant)
    check_moved(trained)
    out = tmp_path / "out"
    export_model(tmp_path / "run", out, adapter=True)
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    check_encoder(out, trained)
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(backbones / "gpt2"), out).eval()
    tokens = tokens_of(out)
    with torch.no_grad():
        hidden = adapted(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    by_hand = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    np.testing.assert_allclose(by_hand, trained["after"]["text"], rtol=0, atol=TOLERANCE)


def check_shapes(file: Path, base: Path, variant: str) -> None:
    """Whole matrices under peft's names, none of shape ``[0]``, for every layer of every block."""
    tensors = load_file(file)
    weights = load_file(base / "model.safetensors")
    prefix = "base_model.model."
    projection = tensors.pop(f"{prefix}visual_projection.weight")
    assert projection.shape == weights["visual_projection.weight"].shape
    assert not torch.equal(projection, weights["visual_projection.weight"])
    expected = {}
    for name, weight in weights.items():
        if ".layers." in name and name.endswith(".weight") and weight.dim() == 2:
            layer = prefix + name.removesuffix(".weight")
            expected[f"{layer}.lora_A.weight"] = (RANK, weight.shape[1])
            expected[f"{layer}.lora_B.weight"] = (weight.shape[0], RANK)
            if variant == "dora":
                expected[f"{layer}.lora_magnitude_vector"] = (weight.shape[0],)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


def test_adapters_of_a_composed_encoder(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train("composed", 3, "dora")  # its text tower is frozen
    out = tmp_path / "out"
    export_model(tmp_path / "run", out, adapter=True)
    names = {path.name for path in (out / "image_encoder").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"}
    assert (out / "text_encoder" / "model.safetensors").is_file()
    assert (out / "text_projection.safetensors").is_file()
    check_encoder(out, trained)


@pytest.mark.parametrize("stage", [0, 3, *slow(1, 2)])
def test_late_interaction(train: Callable[..., Any], tmp_path: Path, stage: int) -> None:
    trained = train("late", stage)["after"]["text"]
    export_model(tmp_path / "run", tmp_path / "out")
    rows = Encoder(tmp_path / "out", device="cpu").encode_text(cases.TEXTS)
    for got, expected in zip(rows, trained, strict=True):
        np.testing.assert_allclose(got, expected[: len(got)], rtol=0, atol=TOLERANCE)
    check_verified(tmp_path)


@pytest.mark.parametrize("stage", [0, 3])
def test_shared_weight_with_two_adapters(
    train: Callable[..., Any], tmp_path: Path, stage: int
) -> None:
    trained = train("tied", stage)
    export_model(tmp_path / "run", tmp_path / "out")
    check_encoder(tmp_path / "out", trained)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    one, two = (weights[f"encoder.layer.{i}.output.dense.weight"] for i in range(2))
    assert not torch.equal(one, two)
