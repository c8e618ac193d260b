"""Which layers get adapters, what stays trained, and which names are refused."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

from tests.parity.data import CLIP, IMAGE, TEXT, save_backbone
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource, load_backbone
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.lora import (
    LoraSpec,
    adapter_config,
    add_adapters,
    base_of,
    merge_adapter_folder,
)
from vembed_ds.models.reach import mark_unreached

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
QWEN = {**SMALL, "model_type": "qwen3", "vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8}
MODERNBERT = {
    **SMALL,
    "model_type": "modernbert",
    "vocab_size": 50,
    "pad_token_id": 0,
    "global_attn_every_n_layers": 1,
}
SIGLIP = {
    "model_type": "siglip",
    "text_config": {**SMALL, "vocab_size": 50},
    "vision_config": {**SMALL, "image_size": 8, "patch_size": 4},
}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [4] * 4, "depths": [1] * 4}
QWEN2_VL = {
    "model_type": "qwen2_vl",
    "text_config": {
        **SMALL,
        "vocab_size": 60,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    },
    "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16},
}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_inner": 12}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
BIT = {**RESNET, "model_type": "bit", "num_groups": 2}


def spec(**options: Any) -> LoraSpec:
    return LoraSpec(**{"r": 2, "alpha": 4.0, **options})


def backbone(settings: dict[str, Any]) -> nn.Module:
    rest = {key: value for key, value in settings.items() if key != "model_type"}
    return AutoModel.from_config(AutoConfig.for_model(settings["model_type"], **rest))


def build(*, freeze: dict[str, bool] | None = None, lora: LoraSpec, **sources: Any) -> Any:
    found = {key.removeprefix("one"): BackboneSource(config=c) for key, c in sources.items()}
    return build_model(ModelSpec(found, projection_dim=6), freeze=freeze, lora=lora)


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapted(module: nn.Module) -> set[str]:
    return {n.rpartition(".lora_A")[0] for n in trained(module) if ".lora_A." in n}


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        (TEXT, {"query", "key", "value", "attention.output.dense", "intermediate.dense", "0.output.dense"}),
        (MODERNBERT, {"Wqkv", "attn.Wo", "Wi", "mlp.Wo"}),
        (QWEN, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (IMAGE, {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}),
        (DINOV2, {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}),
        (CONVNEXT, {"pwconv1", "pwconv2"}),
        (GPT2, {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}),
    ],
)  # fmt: skip
def test_attention_and_feed_forward_of_the_blocks(settings: dict[str, Any], ends: set[str]) -> None:
    model = backbone(settings)
    add_adapters([model], spec())
    names = adapted(model)
    assert names
    assert all(".0." in name or ".1." in name for name in names), "only layers of repeated blocks"
    unmatched = {end for end in ends if not any(name.endswith(end) for name in names)}
    other = {name for name in names if not name.endswith(tuple(ends)) and ".1." not in name}
    assert (unmatched, other) == (set(), set())
    assert all(".lora_" in name for name in trained(model))


@pytest.mark.parametrize("settings", [CLIP, SIGLIP])
def test_both_towers_of_one_backbone(settings: dict[str, Any]) -> None:
    model = backbone(settings)
    add_adapters([model], spec())
    assert {name.split(".")[0] for name in adapted(model)} == {"text_model", "vision_model"}
    assert not any("head" in name for name in adapted(model))  # SigLIP reads it, never calls it


def test_language_and_vision_of_a_vision_language_model() -> None:
    model = backbone(QWEN2_VL)
    add_adapters([model], spec())
    names = adapted(model)
    assert {name.split(".")[0] for name in names} == {"language_model", "visual"}
    assert {name.rpartition(".")[2] for name in names if name.startswith("visual")} == {
        *("qkv", "proj", "fc1", "fc2")
    }


def test_all_linear_means_all_of_them() -> None:
    model = backbone(CLIP)
    everything = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    add_adapters([model], spec(target_modules="all-linear"))
    assert adapted(model) == everything
    assert "visual_projection" in everything


def test_named_layers_only() -> None:
    model = backbone(CLIP)
    whole = "vision_model.encoder.layers.0.mlp.fc1"
    add_adapters([model], spec(target_modules=["q_proj", whole]))
    assert {name.rpartition(".")[2] for name in adapted(model) - {whole}} == {"q_proj"}
    assert whole in adapted(model)
    assert len(adapted(model)) == 5  # not the fc1 of another layer


def test_rank_scaling_and_start() -> None:
    model = backbone(TEXT)
    inputs = {"input_ids": torch.tensor([[2, 3, 4]])}
    plain = model.eval()(**inputs).last_hidden_state
    add_adapters([model], spec(r=4, alpha=6.0, use_rslora=True, dropout=0.5))
    layer = model.encoder.layer[0].attention.self.query
    assert layer.scaling["default"] == pytest.approx(3.0)  # 6 / sqrt(4)
    assert layer.lora_A["default"].weight.shape == (4, 16)
    torch.testing.assert_close(model.eval()(**inputs).last_hidden_state, plain, rtol=0, atol=0)
    model.train()
    assert layer.training
    assert layer.lora_dropout["default"].p == 0.5


def test_projections_stay_trained_and_a_frozen_tower_gets_none() -> None:
    model: EmbeddingModel = build(text=TEXT, image=IMAGE, freeze={"text": True}, lora=spec())
    text, image = (model.encoder.tower(stream) for stream in ("text", "image"))
    assert adapter_config(text.backbone) is None
    assert not trained(text.backbone)
    assert trained(text.projection)
    assert trained(image.projection)
    assert adapted(image.backbone)
    model.train()
    assert not any(module.training for module in text.backbone.modules())
    assert all(module.training for module in image.backbone.modules())  # its dropout acts


def test_a_frozen_tower_of_a_clip_gets_none() -> None:
    model: EmbeddingModel = build(one=CLIP, freeze={"image": True}, lora=spec())
    names = adapted(model.encoder.backbone)
    assert {name.split(".")[0] for name in names} == {"text_model"}
    assert not model.encoder.backbone.vision_model.training


@pytest.mark.parametrize("frozen", [True, False])
def test_only_a_frozen_tower_is_cached(frozen: bool) -> None:
    model = build(text=TEXT, image=IMAGE, freeze={"text": frozen}, lora=spec())
    assert model.encoder.has_fixed_features("text") is frozen
    assert not model.encoder.has_fixed_features("image")


def test_modules_to_save_are_trained_whole_without_adapters() -> None:
    model = backbone(CLIP)
    add_adapters([model], spec(target_modules="all-linear", modules_to_save=["visual_projection"]))
    assert "visual_projection.weight" in trained(model)
    assert "visual_projection" not in adapted(model)
    assert "text_projection" in adapted(model)
    assert adapter_config(model).modules_to_save == ["visual_projection"]


def test_lengths_do_not_decay_but_matrices_do() -> None:
    model = backbone(TEXT)
    add_adapters([model], spec(use_dora=True))
    decay, rest = build_param_groups(model, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("lora_A" in names[id(p)] or "lora_B" in names[id(p)] for p in decay["params"])
    assert all("magnitude" in names[id(p)] for p in rest["params"])


def test_an_adapter_that_starts_at_zero_is_reached() -> None:
    model = build(one=TEXT, lora=spec())
    inputs = {"text": {"input_ids": torch.tensor([[2, 3, 4]])}}
    assert mark_unreached(model, inputs) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["qery"]},
            r"lora_target_modules: 'qery' is no part of the model that is trained; nearest: query,",
        ),
        (
            {"target_modules": ["query", "fc9"]},
            r"lora_target_modules: 'fc9' is no part of the model that is trained; nearest: ",
        ),
        ({"target_modules": ["uery"]}, r"'uery' is no part of .* nearest: query,"),
        (
            {"modules_to_save": ["poolr"]},
            r"lora_modules_to_save: 'poolr' is no part of .* nearest: pooler,",
        ),
    ],
)
def test_a_name_that_matches_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapters([backbone(TEXT)], spec(**options))


def test_a_frozen_part_cannot_be_named() -> None:
    with pytest.raises(ConfigError, match="'fc1' is no part of the model that is trained"):
        build(text=TEXT, image=IMAGE, freeze={"image": True}, lora=spec(target_modules=["fc1"]))


def test_every_trained_tower_needs_a_layer() -> None:
    with pytest.raises(
        ConfigError, match=r"lora_target_modules=\['query'\]: ViTModel has no such linear layer"
    ):
        build(text=TEXT, image=IMAGE, lora=spec(target_modules=["query"]))


def test_a_backbone_without_linear_layers() -> None:
    with pytest.raises(
        ConfigError, match=r"lora_target_modules=null .* has no such .* its linear layers: none\."
    ):
        add_adapters([backbone(BIT)], spec())


def test_transposed_layers_are_said_to_be() -> None:
    model, other = backbone(GPT2), backbone(TEXT)
    add_adapters([model, other], spec())  # a peft warning would be an error here
    assert adapter_config(model).fan_in_fan_out is True
    assert adapter_config(other).fan_in_fan_out is False
    layer = model.h[0].mlp.c_fc
    assert layer.lora_A["default"].weight.shape == (2, 8)
    assert layer.lora_B["default"].weight.shape == (12, 2)


def test_layers_of_both_kinds() -> None:
    model = backbone(GPT2)
    model.h[0].mlp.c_fc = nn.Linear(8, 12)
    with pytest.raises(
        ConfigError,
        match=r"GPT2Model has layers of two kinds, h\.0\.mlp\.c_fc \(Linear\) and .*\(Conv1D\), and "
        "one adapter cannot have both; name layers of one kind",
    ):
        add_adapters([model], spec())
    add_adapters([model], spec(target_modules=["c_fc"]))
    assert adapted(model) == {"h.0.mlp.c_fc"}


def test_layers_that_peft_refuses() -> None:
    """Mamba's kernels read the weight of ``out_proj`` and never call it."""
    config = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
    spec = ModelSpec({"": BackboneSource(config=config)})
    with pytest.raises(ConfigError, match=r"lora_target_modules: MambaModel cannot .*out_proj"):
        build_model(spec, lora=LoraSpec(r=2, alpha=2.0, dropout=0.0))
    names = ("in_proj", "x_proj")
    build_model(spec, lora=LoraSpec(r=2, alpha=2.0, dropout=0.0, target_modules=names))


def test_nothing_to_adapt() -> None:
    with pytest.raises(ConfigError, match="use_lora=true: no tower is trained"):
        build(text=TEXT, image=IMAGE, freeze={"text": True, "image": True}, lora=spec())


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    """An adapter that peft itself has written, and its base model, in ``base``."""
    save_backbone(tmp_path / "base", TEXT, dropout=0.0, seed=0)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    with warnings.catch_warnings():  # peft asks transformers by a name that is going away
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder: Path) -> nn.Module:
    source = BackboneSource(name=str(folder))
    return load_backbone(source, attn_implementation=None, trust_remote_code=False)


def test_an_adapter_of_another_program_is_read(peft_folder: Path) -> None:
    base = base_of(peft_folder)
    assert base == str(peft_folder.parent / "base")
    inputs = {"input_ids": torch.tensor([[2, 3, 4]])}
    plain = load(Path(base))(**inputs).last_hidden_state
    got = merge_adapter_folder(load(Path(base)), peft_folder)(**inputs).last_hidden_state
    tensors = load_file(peft_folder / "adapter_model.safetensors")
    by_hand = load(Path(base))
    for index, layer in enumerate(by_hand.encoder.layer):
        prefix = f"base_model.model.encoder.layer.{index}.attention.self.query"
        change = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        layer.attention.self.query.weight.data += 4 * change  # peft's alpha 8 / r 2
    torch.testing.assert_close(got, by_hand(**inputs).last_hidden_state)
    assert not torch.allclose(got, plain)


def test_an_adapter_of_another_model(peft_folder: Path, tmp_path: Path) -> None:
    save_backbone(tmp_path / "image", IMAGE, dropout=0.0, seed=0)
    with pytest.raises(
        ConfigError, match=r"adapter: the adapter does not fit ViTModel: Target mod"
    ):
        merge_adapter_folder(load(tmp_path / "image"), peft_folder)


def test_an_adapter_that_lacks_a_weight(peft_folder: Path, tmp_path: Path) -> None:
    file = peft_folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=rf"does not fit BertModel: {name} is on one side only"):
        merge_adapter_folder(load(tmp_path / "base"), peft_folder)


def test_an_adapter_without_weights(peft_folder: Path, tmp_path: Path) -> None:
    (peft_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="adapter: the adapter does not fit BertModel: "):
        merge_adapter_folder(load(tmp_path / "base"), peft_folder)


def test_damaged_settings_of_an_adapter(tmp_path: Path) -> None:
    assert base_of(tmp_path) is None
    path = tmp_path / "adapter_config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config.json: damaged: Expecting"):
        base_of(tmp_path)
    path.write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ConfigError, match="base_model_name_or_path=None; name the base model"):
        base_of(tmp_path)
    shutil.rmtree(tmp_path)
