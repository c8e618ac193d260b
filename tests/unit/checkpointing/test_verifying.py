"""`--verify` passes for every kind of model, and notices whatever may be wrong with a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.converting import save_checkpoint
from tests.distributed import export_cases as cases
from tests.unit.checkpointing.test_card import MODELS
from vembed_ds import convert
from vembed_ds.checkpointing import adapters
from vembed_ds.checkpointing.export import export_model
from vembed_ds.checkpointing.planning import Options
from vembed_ds.checkpointing.tensor_files import TensorFile
from vembed_ds.checkpointing.verifying import (
    LIMIT,
    LIMIT_MERGED,
    LIMITS_MERGED_16_BIT,
    Comparison,
    require_equal,
    verify_export,
)
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.errors import CheckpointError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.lora import LoraSpec, add_adapters

Save = Callable[..., Path]


def lora_model(backbones: Path, kind: str, **options: Any) -> Any:
    """With an adapter that does something."""
    torch.manual_seed(3)
    model = cases.make_model(backbones, kind)
    add_adapters(model.trained_backbones(), LoraSpec(r=2, alpha=4.0, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(name, "float32") for name in MODELS],
        *[(name, "bfloat16") for name in ("mean", "composed", "adapter")],
    ],
)
def test_a_conversion_that_is_right(
    backbones: Path, save: Save, tmp_path: Path, name: str, dtype: str
) -> None:
    kind, make = MODELS[name]
    saved = save(make(backbones), kind)
    options = {"adapter": name == "adapter", "dtype": dtype}
    export_model(saved, tmp_path / "out", **options)
    found = verify_export(saved, tmp_path / "out", Options(**options))
    require_equal(found, tmp_path / "out")
    assert [one.reader for one in found] == ["vembed_ds", "sentence-transformers"]
    assert found[0].num_items == {"clip": 10, "composed": 10, "convnext": 4}.get(kind, 6) + (
        kind in ("clip", "composed")
    )
    assert found[0].limit == (LIMIT_MERGED if name == "adapter" else LIMIT)
    assert (found[0].rounding is None) == (dtype == "float32")
    if found[0].rounding is not None and name != "adapter":
        assert found[0].rounding > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_keeps_tables_of_its_weights(tmp_path: Path, dtype: str) -> None:
    """LeViT gathers its attention biases once, in evaluation."""
    stages = {"num_attention_heads": [1, 1, 1], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    config = {"model_type": "levit", "image_size": 64, "hidden_sizes": [16, 16, 16], **stages}
    model = build_model(ModelSpec({"": BackboneSource(config=config)}), freeze_batch_norm=True)
    for name, parameter in model.named_parameters():
        if "attention_biases" in name:
            torch.nn.init.normal_(parameter)
    reader = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
    processor = build_item_processor(None, reader, max_length=None)
    saved = save_checkpoint(tmp_path / "run", model, processor)
    export_model(saved, tmp_path / "out", dtype=dtype)
    require_equal(verify_export(saved, tmp_path / "out", Options(dtype=dtype)), tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "options", "dtype"),
    [
        ("shared", {}, "float32"),
        ("shared", {"use_rslora": True}, "float16"),
        ("gpt2", {"use_dora": True}, "float32"),
        ("clip", {"use_dora": True}, "bfloat16"),
    ],
)
def test_merged_adapters(
    backbones: Path, save: Save, tmp_path: Path, kind: str, options: dict[str, Any], dtype: str
) -> None:
    saved = save(lora_model(backbones, kind, **options), kind)
    export_model(saved, tmp_path / "out", dtype=dtype)
    found = verify_export(saved, tmp_path / "out", Options(dtype=dtype))
    require_equal(found, tmp_path / "out")
    assert found[0].limit == LIMITS_MERGED_16_BIT.get(dtype, LIMIT_MERGED)


def add_to(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})


def swap(file: Path, one: str, other: str) -> None:
    tensors = load_file(file)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, file, metadata={"format": "pt"})


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


LAYER = "encoder.layer.1.attention.self.{}.weight"
DAMAGE: dict[str, Callable[[Path], None]] = {
    "one number": lambda out: add_to(out / "model.safetensors", LAYER.format("value")),
    "two tensors swapped": lambda out: swap(
        out / "model.safetensors", LAYER.format("query"), LAYER.format("key")
    ),
    "the pooling": lambda out: change(out / "vembed_config.json", pooling={"": "cls"}),
    "the length": lambda out: change(out / "vembed_config.json", max_seq_length=5),
    "an activation": lambda out: change(out / "config.json", hidden_act="relu"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_is_wrong(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    export_model(checkpoint, out)
    DAMAGE[damage](out)
    found = verify_export(checkpoint, out, Options())
    with pytest.raises(
        CheckpointError, match=r"out: was written, but its embeddings by vembed_ds "
    ):
        require_equal(found, out)
    assert (out / "model.safetensors").is_file()


@pytest.fixture
def checkpoint(backbones: Path, save: Save) -> Path:
    return save(cases.make_model(backbones, "shared"), "shared")


def test_an_adapter_merged_wrongly(
    backbones: Path, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(lora_model(backbones, "shared"), "shared")
    right = adapters.merged_weight

    def doubled(*arguments: Any, scaling: float, **options: Any) -> torch.Tensor:
        return right(*arguments, scaling=1.01 * scaling, **options)

    monkeypatch.setattr(adapters, "merged_weight", doubled)
    export_model(saved, tmp_path / "out")
    found, *_ = verify_export(saved, tmp_path / "out", Options())
    assert found.difference > 1e-4


def test_a_wrong_format(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "out", dtype="bfloat16")
    found, *_ = verify_export(checkpoint, tmp_path / "out", Options(dtype="float16"))
    assert found.difference > 1e-4


def test_what_another_reader_finds_wrong(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(checkpoint, out)
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    change(out / "1_Pooling" / "config.json", **modes)
    found = verify_export(checkpoint, out, Options())
    assert found[0].difference <= LIMIT
    with pytest.raises(CheckpointError, match=r"its embeddings by sentence-transformers differ"):
        require_equal(found, out)


def test_no_number_is_a_difference(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"by up to nan \(limit 1e-06\)"):
        require_equal([Comparison("vembed_ds", 1, float("nan"), LIMIT)], tmp_path)


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [str(checkpoint), str(out), "--verify", "--dtype", "bfloat16"]
    assert convert.main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"6 sample items by vembed_ds: .* up to \S+ \(limit 1e-06\)", said)
    assert "bfloat16 itself moves them by up to " in said


def test_command_when_the_conversion_is_wrong(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = TensorFile.write

    def wrong(self: TensorFile, name: str, tensor: torch.Tensor) -> int:
        return right(self, name, tensor * (1.01 if name.endswith("value.weight") else 1))

    monkeypatch.setattr(TensorFile, "write", wrong)
    assert convert.main([str(checkpoint), str(tmp_path / "out"), "--verify"]) == 2
    assert "differ from the trained model's by up to" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_description_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "out")
    change(checkpoint / "model" / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"encoder.layer.2.* and not in both"):
        verify_export(checkpoint, tmp_path / "out", Options())
