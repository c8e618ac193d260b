"""Where weights end up, and what keeps a conversion from being written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from tests.converting import adapted, family_model
from tests.converting import convert as convert_model
from tests.distributed import export_cases as cases
from vembed_ds import Encoder, convert
from vembed_ds.checkpointing import export
from vembed_ds.checkpointing.adapters import adapter_names
from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.checkpointing.export import export_model
from vembed_ds.data.records import Item
from vembed_ds.errors import CheckpointError
from vembed_ds.inference import embed_items, find_model
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.hollow import build_hollow
from vembed_ds.models.lora import LoraSpec, add_adapters

Save = Callable[..., Path]
DENSE = ("1_Pooling", "2_Dense", "3_Dense")  # sentence-transformers' folders


@pytest.fixture
def checkpoint(backbones: Path, save: Save) -> Path:
    return save(cases.make_model(backbones, "shared"), "shared")


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def clip_model(backbones: Path, **options: Any) -> EmbeddingModel:
    spec = ModelSpec({"": BackboneSource(name=str(backbones / "clip"))}, **options)
    return build_model(spec, init_logit_scale=None)


def siglip_model(**options: Any) -> EmbeddingModel:
    vision = cases.SETTINGS["clip"]["vision_config"]
    text = cases.SETTINGS["clip"]["text_config"] | {"projection_size": 18}
    config = {"model_type": "siglip", "text_config": text, "vision_config": vision}
    torch.manual_seed(0)
    return build_model(ModelSpec({"": BackboneSource(config=config)}), **options)


def test_fixed_temperature_stays_the_backbones(backbones: Path, save: Save, tmp_path: Path) -> None:
    model = clip_model(backbones)
    export_model(save(model, "clip"), tmp_path / "out")
    original = load_file(backbones / "clip" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert set(original) == set(exported)
    assert all(torch.equal(original[name], exported[name]) for name in original)
    assert original["logit_scale"].shape == exported["logit_scale"].shape == ()


def test_learned_temperature_takes_the_backbones_shape(save: Save, tmp_path: Path) -> None:
    model = siglip_model(init_logit_scale=-math.log(0.5))
    export_model(save(model, "clip"), tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported["logit_scale"].shape == exported["logit_bias"].shape == (1,)
    assert float(exported["logit_scale"]) == pytest.approx(0.6931472)


def test_projection_behind_both_towers(backbones: Path, save: Save, tmp_path: Path) -> None:
    model = clip_model(backbones, projection_dim=4)
    export_model(save(model, "clip"), tmp_path / "out")
    encoder = Encoder(tmp_path / "out", device="cpu")
    rows = encoder.encode_text(["a dog"], normalize=False)
    assert rows.shape == (1, 4)
    plain = Encoder(backbones_with_tokenizer(tmp_path, backbones), device="cpu")
    weight = load_file(tmp_path / "out" / "projection_head.safetensors")["weight"].numpy()
    expected = plain.encode_text(["a dog"], normalize=False) @ weight.T
    assert rows == pytest.approx(expected, abs=1e-6)


def backbones_with_tokenizer(tmp_path: Path, backbones: Path) -> Path:
    """The original CLIP folder with the processor files of the export."""
    folder = tmp_path / "plain"
    AutoModel.from_pretrained(backbones / "clip").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((tmp_path / "out" / name).read_bytes())
    return folder


def test_files_of_a_composed_encoder(backbones: Path, save: Save, tmp_path: Path) -> None:
    export_model(save(cases.make_model(backbones, "composed"), "composed"), tmp_path / "out")
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    images = {"preprocessor_config.json"}
    weights = {"config.json", "model.safetensors"}
    names = {
        "": {
            *tokenizer | images,
            *("vembed_config.json", "README.md", "text_encoder", "image_encoder"),
            *("text_projection.safetensors", "image_projection.safetensors"),
            *("text_projection.pt", "image_projection.pt"),  # vembed-factory's
            *("modules.json", "router_config.json", "config_sentence_transformers.json"),
            *(f"{s}_{part}" for s in ("text", "image") for part in DENSE),
            "1_Normalize",
        },
        "text_encoder": tokenizer | weights | {"sentence_bert_config.json"},
        "image_encoder": images | weights | {"sentence_bert_config.json"},
    }
    for folder, expected in names.items():
        assert {path.name for path in (tmp_path / "out" / folder).iterdir()} == expected
    assert not list(tmp_path.glob(".out*"))


def test_tokenizer_states_the_training_length(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer("dog " * 50, truncation=True)["input_ids"]) == cases.MAX_LENGTH


def test_settings_of_the_caller_are_kept_but_for_what_the_model_decides(
    checkpoint: Path, backbones: Path, tmp_path: Path
) -> None:
    model = cases.make_model(backbones, "shared")
    settings = {"loss_type": "infonce", "pooling_method": "cls", "projection_dim": 99}
    describe_model(
        tmp_path / "model",
        model=model,
        processor=cases.make_processor(model, "shared"),
        settings=settings,
    )
    written = json.loads((tmp_path / "model" / "vembed_config.json").read_text())
    assert written["loss_type"] == "infonce"
    assert (written["pooling_method"], written["projection_dim"]) == ("mean", None)


def test_filled_target_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_model(checkpoint, out)  # an empty folder is fine
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(
        CheckpointError,
        match=r"out: exists and is not an empty folder; give a new one, or remove it",
    ):
        export_model(checkpoint, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_target_where_no_folder_can_stay(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"b: lies below .*file, which is a file; give another"
    ):
        export_model(checkpoint, tmp_path / "file" / "a" / "b")
    with pytest.raises(
        CheckpointError, match=r"lies in the checkpoint .* training deletes it .*; give"
    ):
        export_model(checkpoint, checkpoint / "converted" / "out")
    assert not (checkpoint / "converted").exists()


def test_interrupted_conversion_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_write_settings", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_model(checkpoint, tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", ["parameters.json", "vembed_config.json", "config.json"])
def test_incomplete_description(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / "model" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"model/{name}: missing; the checkpoint is incom"):
        export_model(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_settings(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model" / "vembed_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vembed_config.json: damaged: Expecting"):
        export_model(checkpoint, tmp_path / "out")


def test_value_that_is_not_described(checkpoint: Path, tmp_path: Path) -> None:
    name = "encoder.towers.text.backbone.pooler.dense.bias"
    change(checkpoint / "model" / "parameters.json", lambda entries: entries.pop(name))
    with pytest.raises(CheckpointError, match=rf"do not fit the model: 1 unexpected: {name}"):
        export_model(checkpoint, tmp_path / "out")


def test_described_value_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=True)
    for name in [name for name in saved["module"] if "layer.1" in name]:
        del saved["module"][name]
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"16 missing: (encoder\S+layer.1\S+, ){4}\S+ \.\.\."):
        export_model(checkpoint, tmp_path / "out")


def test_value_of_another_shape(checkpoint: Path, tmp_path: Path) -> None:
    name = "encoder.towers.text.backbone.pooler.dense.bias"
    path = checkpoint / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=True)
    saved["module"][name] = torch.zeros(19)
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(19,\), described as \(18,\)"):
        export_model(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_a_model_that_diverged(checkpoint: Path, tmp_path: Path) -> None:
    name = "encoder.towers.text.backbone.pooler.dense.bias"
    path = checkpoint / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=True)
    saved["module"][name][3] = torch.nan
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=rf"{name} has NaN: .* convert an earlier checkpoint"):
        export_model(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_config_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint / "model" / "config.json", lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(
        CheckpointError, match=r"model: BertModel: .* 16 unexpected: encoder.layer.1"
    ):
        export_model(checkpoint, tmp_path / "out")


def test_config_of_other_sizes(checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint / "model" / "config.json", lambda config: config.update(vocab_size=9))
    with pytest.raises(
        CheckpointError,
        match=r"word_embeddings.weight has shape \(30522, 18\), and by config.json \(9, 18\)",
    ):
        export_model(checkpoint, tmp_path / "out")


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    out = tmp_path / "out"
    assert convert.main([str(checkpoint.parent), str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{checkpoint} -> {out}" in printed
    assert f"Encoder({str(out)!r})" in printed
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_command_takes_the_names_of_precision_too(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    assert convert.main([str(checkpoint), str(out), "--dry_run", "--dtype", name]) == 0
    assert f"-> {out} (bfloat16); nothing was written" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        convert.main([str(checkpoint), str(out), "--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_command_fails_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vembed_ds.convert", str(tmp_path), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "no DeepSpeed checkpoint" in lines[0]
    assert "Traceback" not in result.stderr


def test_command_refuses_an_adapter_that_was_not_trained(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(checkpoint), str(tmp_path / "out"), "--adapter"]) == 2
    assert (
        "was trained without use_lora, so it has no adapter; leave out" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_whole(backbones: Path, save: Save, tmp_path: Path) -> None:
    model = cases.make_model(backbones, "shared")
    add_adapters(model.trained_backbones(), LoraSpec(r=2, alpha=4.0, target_modules=["query"]))
    folder = save(model, "shared")
    change(folder / "model" / "adapter_config.json", lambda config: config.update(use_dora=True))
    with pytest.raises(CheckpointError, match=r"layer.0.attention.self.query: its adapter is not"):
        export_model(folder, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_modules_to_save_whose_name_ends_others(tmp_path: Path) -> None:
    """peft compares names by their last letters: ``norm`` is every ``input_layernorm`` too."""
    model, processor = family_model(tmp_path / "base", "qwen3")
    adapted(model, target_modules=["q_proj"], modules_to_save=["norm"])
    names = {"norm.weight", "layers.1.self_attn.q_proj.lora_A.default.weight"}
    assert {f"encoder.towers.text.backbone.{name}" for name in names} <= {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    with torch.no_grad():
        model.encoder.tower("text").backbone.norm.weight.mul_(torch.linspace(1, 2, 16))
    out = convert_model(tmp_path, model.eval(), processor, adapter=True)
    items = [processor.encode(Item(text=t), origin="", augment_seed=None) for t in cases.TEXTS]
    expected = embed_items(model, processor, items).values
    found = embed_items(Encoder(out, device="cpu").model, processor, items).values
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    hollow = build_hollow(find_model(str(out), trust_remote_code=False).spec)
    norms = {n: t for n, t in hollow.tensors() if n.endswith("backbone.norm.weight")}
    assert [t.tolist() for t in norms.values()] == [
        model.encoder.tower("text").backbone.norm.weight.tolist()
    ]


def test_an_adapter_that_peft_would_take_for_a_module_to_save(tmp_path: Path) -> None:
    names = ["norm.weight", "layers.0.pre_norm.base_layer.weight"]
    config = {"base_model_name_or_path": "base", "modules_to_save": ["norm"]}
    with pytest.raises(CheckpointError, match=r"layers.0.pre_norm has an adapter and ends like"):
        adapter_names(names, config, place="model")


def test_damaged_adapter_settings(backbones: Path, save: Save, tmp_path: Path) -> None:
    model = cases.make_model(backbones, "shared")
    add_adapters(model.trained_backbones(), LoraSpec(r=2, alpha=4.0))
    folder = save(model, "shared")
    (folder / "model" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: damaged: Expecting"):
        export_model(folder, tmp_path / "out")
