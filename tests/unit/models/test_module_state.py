"""Starting points of vembed-factory: its module in accelerate's files, and its adapters."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from tests.parity.families import FAMILIES
from vembed_ds import Encoder
from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import ModelConfig
from vembed_ds.errors import ConfigError
from vembed_ds.models.builder import build_encoder
from vembed_ds.models.hollow import build_hollow
from vembed_ds.training.model_setup import model_spec, setup_model

SETTINGS: dict[str, Any] = {
    "pooling_method": "cls",
    "projection_dim": 6,
    "topk_tokens": 0,
    "encoder_mode": "auto",
    "text_model_name": None,
    "image_model_name": None,
}
TEXTS = ["a dog", "rain"]
Save = Callable[..., Path]


class Backend(nn.Module):
    """The module of vembed-factory, as far as names go: everything in it is given."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.backend = nn.Module()
        for name, part in parts.items():
            self.backend.add_module(name, part)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    FAMILIES["bert"].save(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def save(tmp_path: Path, bert: Path) -> Save:
    """``save(parts, settings, accelerate's options)``: a checkpoint's folder with its state."""

    def write(
        parts: dict[str, nn.Module], *, settings: dict[str, Any] | None = None, **options: Any
    ) -> Path:
        folder = tmp_path / "checkpoint-epoch-2"
        Accelerator(cpu=True).save_model(Backend(**parts), str(folder), **options)
        shutil.copy(bert / "config.json", folder)
        AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
        (folder / "vembed_config.json").write_text(json.dumps(SETTINGS | (settings or {})))
        (folder / "optimizer.bin").write_bytes(b"accelerate's")
        return folder

    return write


def trained(model: Any, *, seed: int = 5) -> Any:
    """Other weights than it came with."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def head() -> nn.Linear:
    torch.manual_seed(6)
    return nn.Linear(16, 6, bias=False)


def parts_of(bert: Path) -> dict[str, nn.Module]:
    return {"backbone": trained(AutoModel.from_pretrained(bert)), "projection_head": head()}


@torch.no_grad()
def expected(folder: Path, backbone: Any, projection: Any) -> np.ndarray:
    """vembed-factory's embedding: the pooler of a BERT, projected."""
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    rows: Tensor = projection(backbone(**tokens).pooler_output)
    result: np.ndarray = functional.normalize(rows, dim=-1).numpy()
    return result


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({}, "model.safetensors"),
        ({"max_shard_size": "6KB"}, "model-00002-of-"),
        ({"safe_serialization": False}, "pytorch_model.bin"),
        ({"safe_serialization": False, "max_shard_size": "6KB"}, "pytorch_model-00002-of-"),
    ],
)
def test_a_state(save: Save, bert: Path, options: dict[str, Any], file: str) -> None:
    parts = parts_of(bert)
    folder = save(parts, **options)
    assert any(path.name.startswith(file) for path in folder.iterdir())
    rows = Encoder(folder, device="cpu").encode_text(TEXTS)
    wanted = expected(folder, parts["backbone"], parts["projection_head"])
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-6)


def test_training_goes_on_from_it_and_says_so(
    save: Save, bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = parts_of(bert)
    data = tmp_path / "a.jsonl"
    data.write_text('{"query": "a dog", "positive": "rain"}')
    values = {"model_name": str(save(parts)), "data_path": str(data), "retrieval_mode": "t2t"}
    config = parse_config(values)
    with caplog.at_level(logging.INFO):
        model = setup_model(config, model_spec(config.model), used=["text"], zero_stage=0)
    assert "checkpoint-epoch-2 is vembed-factory's module in accelerate's state" in caplog.text
    tower = model.encoder.tower("text")
    assert tower.pooling == "pooler"
    assert torch.equal(tower.projection.weight, parts["projection_head"].weight)
    for name, tensor in parts["backbone"].state_dict().items():
        assert torch.equal(tower.backbone.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft asks for it
def test_adapters_in_a_state(save: Save, bert: Path) -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["query", "value"],
        modules_to_save=["pooler"],
        base_model_name_or_path=str(bert),
    )
    backbone = trained(get_peft_model(AutoModel.from_pretrained(bert), config))
    parts = {"backbone": backbone, "projection_head": head()}
    folder = save(parts)
    (folder / "config.json").unlink()  # vembed-factory writes none beside an adapter
    with pytest.raises(ConfigError, match=r"adapter_config.json: missing, but backend.backbone.\*"):
        Encoder(folder)
    backbone.peft_config["default"].save_pretrained(folder)
    wanted = expected(folder, backbone, parts["projection_head"])
    rows = Encoder(folder, device="cpu").encode_text(TEXTS)
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-6)
    # Its own folders have peft's files, too: then these are read, and accelerate's are left.
    backbone.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file()
    for name in ("model.safetensors", "projection_head.pt"):
        (folder / name).unlink(missing_ok=True)
    torch.save(parts["projection_head"].state_dict(), folder / "projection_head.pt")
    save_file({"backend.backbone.nothing": torch.ones(1)}, folder / "model.safetensors")
    rows = Encoder(folder, device="cpu").encode_text(TEXTS)
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-6)
    spec = model_spec(ModelConfig(model_name=str(folder)))
    assert torch.equal(
        build_encoder(spec).tower("text").projection.weight, parts["projection_head"].weight
    )


def test_a_state_of_a_composed_encoder(save: Save, bert: Path, tmp_path: Path) -> None:
    FAMILIES["dinov2"].save(tmp_path / "dinov2")
    models = {"text": trained(AutoModel.from_pretrained(bert)), "image": None}
    models["image"] = trained(AutoModel.from_pretrained(tmp_path / "dinov2"))
    heads = {}
    for stream in models:
        torch.manual_seed(len(stream))
        layers = (nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 6, bias=False))
        heads[f"{stream}_projection"] = nn.Sequential(*layers)
    encoders = {}
    for stream, model in models.items():
        encoders[f"{stream}_encoder"] = nn.Module()
        encoders[f"{stream}_encoder"].add_module("model", model)
    names = {"text_model_name": str(bert), "image_model_name": str(tmp_path / "dinov2")}
    folder = save({**encoders, **heads}, settings={"encoder_mode": "composed", **names})
    encoder = Encoder(folder, device="cpu")
    rows = encoder.encode_text(TEXTS)
    wanted = expected(folder, models["text"], heads["text_projection"])
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-6)
    for name, tensor in models["image"].state_dict().items():
        assert torch.equal(encoder.model.encoder.tower("image").backbone.state_dict()[name], tensor)
    (folder / "vembed_config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(
        ConfigError, match=r"vembed_config.json names no text_model_name, whose con"
    ):
        Encoder(folder)


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Add tensors to the state, or remove them (``None``); ``__`` stands for a dot."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        if tensor is None:
            del stored[key]
        else:
            stored[key] = tensor
    save_file(stored, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backend__backbone__encoder__layer__0__output__dense__bias": None},
            r"lack 1 of the weights of BertModel \(first: encoder.layer.0.output.dense.bias\)",
        ),
        (
            {"backend__backbone__more": torch.ones(1)},
            r"the weights do not fit BertModel: 1 unexpected \(first: more\)",
        ),
        (
            {"backend__other__weight": torch.ones(1)},
            r"hold 1 tensors that are no part of a model known here \(first: backend.other.weight\)",
        ),
        (
            {"backend__projection_head__weight": None},
            r"projection_head.pt: missing, but vembed_config.json says projection_dim=6",
        ),
    ],
)
def test_weights_that_do_not_fit(
    save: Save, bert: Path, changes: dict[str, Any], message: str
) -> None:
    folder = save(parts_of(bert))
    change(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        Encoder(folder)


def test_a_missing_or_damaged_file(save: Save, bert: Path) -> None:
    folder = save(parts_of(bert), max_shard_size="6KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(b"short")
    with pytest.raises(ConfigError, match=rf"{shard.name}: damaged"):
        Encoder(folder)
    shard.unlink()
    with pytest.raises(
        ConfigError, match=rf"{shard.name}: missing, but model.safetensors.index.js"
    ):
        Encoder(folder)


def test_without_what_says_how_it_pools(save: Save, bert: Path) -> None:
    folder = save(parts_of(bert))
    (folder / "vembed_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no vembed_config.json, which says how they are pooled"):
        Encoder(folder)
    with pytest.raises(ConfigError, match=r"no vembed_config.json, which says how they are pooled"):
        model_spec(ModelConfig(model_name=str(folder)))


def test_without_a_config(save: Save, bert: Path) -> None:
    folder = save(parts_of(bert))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json: missing, and accelerate's state does not"):
        Encoder(folder)


def test_files_of_fsdp(save: Save, bert: Path) -> None:
    folder = save(parts_of(bert))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ConfigError, match=r"pytorch_model_fsdp_0: FSDP's own files.*merge-weights"):
        Encoder(folder)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["VEMBED_TEST_SPILL"],))


def test_a_state_runs_no_code(
    save: Save, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEMBED_TEST_SPILL", str(tmp_path / "ran"))
    folder = save(parts_of(bert))
    (folder / "model.safetensors").unlink()
    torch.save({"backend.backbone.weight": _Code()}, folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"pytorch_model.bin: .*more than tensors \(posix.mkdir\)"
    ):
        Encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_teacher_in_shards_cannot_be_read_from_it(save: Save, bert: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"which are not read tensor by tensor; give a checkpoint"
    ):
        build_hollow(model_spec(ModelConfig(model_name=str(save(parts_of(bert))))))
