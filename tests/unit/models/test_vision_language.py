"""Vision-language encoders: what is frozen, pooled, and refused; and families with a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, ViTMAEForPreTraining, ViTMAEModel

from tests.parity.families import FAMILIES, random_model
from vembed_ds.data import vision_language as items
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource, kind_of, load_backbone
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.families import VISION_LANGUAGE

MAE = {
    "model_type": "vit_mae",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}


def spec(model_type: str, **options: Any) -> ModelSpec:
    return ModelSpec({"": BackboneSource(config=FAMILIES[model_type].settings)}, **options)


def trained(model: torch.nn.Module, part: str) -> set[bool]:
    return {p.requires_grad for name, p in model.named_parameters() if f".{part}." in name}


def test_the_families_of_models_are_those_of_items() -> None:
    assert VISION_LANGUAGE.keys() == items.FAMILIES.keys()


@pytest.mark.parametrize("model_type", VISION_LANGUAGE)
def test_streams_pooling_and_parts(model_type: str) -> None:
    model = build_model(spec(model_type))
    assert model.streams == ("text", "image")
    late = model_type.startswith("col")
    assert model.pooling() == dict.fromkeys(model.streams, "none" if late else "last_token")
    owned = {
        id(p)
        for part in model.streams
        for module in model.encoder.backbone_modules(part)
        for p in module.parameters()
    }
    rest = {name for name, p in model.named_parameters() if id(p) not in owned}
    head = "encoder.towers.item.backbone.embedding_proj_layer."
    assert rest == ({f"{head}weight", f"{head}bias"} if late else set())


@pytest.mark.parametrize(("part", "other"), [("visual", "language_model")])
def test_each_part_can_be_frozen(part: str, other: str) -> None:
    model = build_model(spec("qwen3_vl"), freeze={"image": True})
    assert trained(model, part) == {False}
    assert trained(model, other) == {True}
    assert model.trainable("text")
    assert model.trainable("image")
    model = build_model(spec("qwen3_vl"), freeze={"text": True})
    assert trained(model, part) == {True}
    assert trained(model, other) == {False}
    assert not model.trainable("text")
    assert model.trainable("image")


def test_images_alone_still_train_the_language_model() -> None:
    model = build_model(spec("qwen2_vl"), used={"image"})
    assert trained(model, "language_model") == {True}
    assert trained(model, "visual") == {True}
    model = build_model(spec("qwen2_vl"), used={"text"})
    assert trained(model, "language_model") == {True}
    assert trained(model, "visual") == {False}


@pytest.mark.parametrize(
    ("model_type", "pooling", "message"),
    [
        (
            "qwen3_vl",
            "cls",
            "Qwen3VLModel has last_token, mean, none .*first token has seen nothing",
        ),
        ("colpali", "mean", "pooling_method=mean: ColPaliForRetrieval has none; leave"),
    ],
)
def test_poolings_that_a_family_lacks(model_type: str, pooling: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(spec(model_type, pooling={"": pooling}))


def test_kept_patches_and_inner_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="topk_tokens: not offered for ColQwen2ForRetrieval"):
        build_model(spec("colqwen2", topk_tokens=2))
    with pytest.raises(ConfigError, match="mrl_layers: not offered for Qwen3VLModel"):
        build_model(spec("qwen3_vl", layers=(1,)))


def test_a_composed_tower_is_no_vision_language_model() -> None:
    sources = {
        "text": BackboneSource(config=FAMILIES["qwen3_vl"].settings),
        "image": BackboneSource(config={"model_type": "vit"}),
    }
    with pytest.raises(ConfigError, match="this is a vision-language model, not a text encoder"):
        build_model(ModelSpec(sources))


@pytest.mark.parametrize("whole", [True, False])
def test_mae_is_a_vit_that_sees_every_patch(tmp_path: Path, whole: bool) -> None:
    settings = {key: value for key, value in MAE.items() if key != "model_type"}
    config = AutoConfig.for_model("vit_mae", **settings, mask_ratio=0.0)
    torch.manual_seed(0)
    own = random_model(ViTMAEForPreTraining(config) if whole else ViTMAEModel(config)).eval()
    own.save_pretrained(tmp_path)
    ours = load_backbone(
        BackboneSource(name=str(tmp_path)), attn_implementation=None, trust_remote_code=False
    ).eval()
    assert kind_of(ours) == "image"
    pixels = torch.randn(3, 3, 16, 16)
    noise = torch.rand(3, 16)  # another order of the patches for every image
    encoder = own.vit if whole else own
    with torch.no_grad():
        theirs = encoder(pixels, noise=noise).last_hidden_state
        found = ours(pixels).last_hidden_state
    order = noise.argsort(dim=1)
    patches = torch.take_along_dim(found[:, 1:], order.unsqueeze(-1), dim=1)
    torch.testing.assert_close(found[:, 0], theirs[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(patches, theirs[:, 1:], rtol=0, atol=1e-5)
    assert found[:, 0].std() > 0.1, "the comparison would say nothing"


def test_mae_positions_are_those_of_its_files(tmp_path: Path) -> None:
    settings = {key: value for key, value in MAE.items() if key != "model_type"}
    own = ViTMAEForPreTraining(AutoConfig.for_model("vit_mae", **settings))
    own.save_pretrained(tmp_path)
    model = build_model(ModelSpec({"": BackboneSource(name=str(tmp_path))}))
    backbone = model.encoder.tower("image").backbone
    expected = own.vit.embeddings.position_embeddings
    assert torch.equal(backbone.embeddings.position_embeddings, expected)
    assert model.pooling() == {"image": "cls"}
    assert not any(p.requires_grad for p in backbone.pooler.parameters())


def test_files_that_lack_weights_are_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers and a warning."""
    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    shallow = AutoConfig.for_model("vit", **settings, num_hidden_layers=1)
    AutoModel.from_config(shallow).save_pretrained(tmp_path)
    shallow.num_hidden_layers = 2
    shallow.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"its files lack 16 of the weights of ViTModel \(first: "
    ):
        build_model(ModelSpec({"": BackboneSource(name=str(tmp_path))}))
