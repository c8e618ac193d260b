"""What is built, what is frozen, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.parity.data import CLIP, IMAGE, TEXT, save_backbone
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import (
    BackboneSource,
    load_skeleton,
    position_limit,
    stated_length,
)
from vembed_ds.models.builder import COMPOSED_PROJECTION_DIM, ModelSpec, build_model
from vembed_ds.models.encoder import TowersEncoder, TwoTowerEncoder
from vembed_ds.models.reach import mark_unreached

QWEN = {
    "model_type": "qwen3",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
}
BIT = {
    "model_type": "bit",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_groups": 2,
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
DINOV3 = {
    "model_type": "dinov3_vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}
NAFLEX = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 2,
    "num_patches": 16,
}
IDS = torch.tensor([[2, 3, 4, 0], [5, 6, 7, 8]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
PIXELS = torch.randn(2, 3, 8, 8)


def spec(**sources: dict[str, Any]) -> ModelSpec:
    return ModelSpec(
        {key.removeprefix("one"): BackboneSource(config=c) for key, c in sources.items()}
    )


@pytest.mark.parametrize(
    ("settings", "stream", "pooling"),
    [
        (TEXT, "text", "cls"),
        (QWEN, "text", "last_token"),
        (IMAGE, "image", "cls"),
        (BIT, "image", "pooler"),
    ],
)
def test_a_backbone_gets_its_familys_stream_and_pooling(
    settings: dict[str, Any], stream: str, pooling: str
) -> None:
    model = build_model(spec(one=settings))
    assert isinstance(model.encoder, TowersEncoder)
    assert model.streams == (stream,)
    assert model.encoder.tower(stream).pooling == pooling
    inputs = (
        {"pixel_values": PIXELS}
        if stream == "image"
        else {"input_ids": IDS, "attention_mask": MASK}
    )
    assert model({stream: inputs})[stream].shape == (2, 16)


def test_a_causal_models_embedding_depends_on_its_input() -> None:
    model = build_model(spec(one=QWEN)).eval()
    one, other = model({"text": {"input_ids": IDS[1:], "attention_mask": MASK[1:]}})["text"], None
    changed = IDS[1:].clone()
    changed[0, 2] = 20
    other = model({"text": {"input_ids": changed, "attention_mask": MASK[1:]}})["text"]
    assert not torch.allclose(one, other)


def test_padding_side_does_not_change_a_causal_models_embedding() -> None:
    model = build_model(spec(one=QWEN)).eval()
    right = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    left = {
        "input_ids": IDS[:1].roll(1, dims=1),
        "attention_mask": MASK[:1].roll(1, dims=1),
        "position_ids": torch.tensor([[0, 0, 1, 2]]),
    }
    torch.testing.assert_close(model({"text": right})["text"], model({"text": left})["text"])


def test_a_composed_encoder_projects_both_towers_to_one_width() -> None:
    model = build_model(spec(text=TEXT, image=BIT))
    out = model(
        {"text": {"input_ids": IDS, "attention_mask": MASK}, "image": {"pixel_values": PIXELS}}
    )
    assert out["text"].shape == out["image"].shape == (2, COMPOSED_PROJECTION_DIM)


@pytest.mark.parametrize("sources", [{"one": CLIP}, {"text": TEXT, "image": IMAGE}])
def test_a_chunk_of_texts_leaves_the_image_tower_alone(sources: dict[str, Any]) -> None:
    model = build_model(spec(**sources))
    model({"text": {"input_ids": IDS, "attention_mask": MASK}})["text"].sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("text" in name for name in reached)
    assert not [name for name in reached if "image" in name or "visi" in name or "visual" in name]


def test_both_towers_of_a_composed_encoder_are_recomputed() -> None:
    model = build_model(spec(text=TEXT, image=IMAGE))
    towers = [model.encoder.tower(stream).backbone for stream in ("text", "image")]
    assert model.trained_backbones() == towers
    for backbone in model.trained_backbones():
        enable_activation_checkpointing(backbone, mechanism="huggingface")
        layers = [
            layer for layer in backbone.modules() if isinstance(layer, GradientCheckpointingLayer)
        ]
        assert layers
        assert all(layer.gradient_checkpointing for layer in layers)


def test_the_attention_kernel_does_not_change_the_precision() -> None:
    sources = {"": BackboneSource(config=TEXT)}
    model = build_model(ModelSpec(sources, attn_implementation="sdpa", projection_dim=4))
    assert model.encoder.tower("text").backbone.config._attn_implementation == "sdpa"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_unused_pooler_is_not_trained() -> None:
    encoder = build_model(spec(one=TEXT)).encoder
    pooler = encoder.tower("text").backbone.pooler
    assert not any(p.requires_grad for p in pooler.parameters())


def test_a_frozen_tower_keeps_its_projection_trainable_and_has_no_dropout() -> None:
    model = build_model(spec(text=TEXT, image=IMAGE), freeze={"text": True}).train()
    tower = model.encoder.tower("text")
    assert model.encoder.has_fixed_features("text")
    assert not tower.backbone.training
    assert not any(m.training for m in tower.backbone.modules())
    assert model.trainable("text")
    assert model.encoder.tower("image").backbone.training


def test_a_frozen_clip_tower_is_not_trainable() -> None:
    model = build_model(spec(one=CLIP), freeze={"image": True}).train()
    assert isinstance(model.encoder, TwoTowerEncoder)
    assert not model.trainable("image")
    assert model.trainable("text")
    assert not model.encoder.backbone.vision_model.training


def test_features_take_the_place_of_the_backbone() -> None:
    model = build_model(spec(text=TEXT, image=IMAGE), freeze={"text": True}).eval()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    features = model.encoder.tower("text").features(inputs)
    torch.testing.assert_close(
        model({"text": {"features": features}})["text"], model({"text": inputs})["text"]
    )


def test_clips_own_temperature_is_lifted_frozen_or_replaced() -> None:
    fixed = build_model(spec(one=CLIP))
    own = fixed.encoder.backbone.logit_scale
    assert own.shape == (1,)
    assert not own.requires_grad
    learned = build_model(spec(one=CLIP), init_logit_scale=-math.log(0.05))
    assert "logit_scale" not in dict(learned.encoder.backbone.named_parameters())
    assert float(learned.logit_scale.detach().exp()) == pytest.approx(20.0)
    outputs = learned({"image": {"pixel_values": PIXELS}})
    assert outputs["logit_scale"].requires_grad


def test_batch_norm_is_refused_unless_frozen() -> None:
    with pytest.raises(ConfigError, match="batch normalisation layers"):
        build_model(spec(one=RESNET))
    model = build_model(spec(one=RESNET), freeze_batch_norm=True).train()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert layers
    assert not any(layer.training for layer in layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": IMAGE, "image": IMAGE}, "this is a image model, not a text encoder"),
        ({"text": TEXT, "image": CLIP}, "this is a two-tower model, not a image encoder"),
        ({"one": {"model_type": "no_such"}}, "cannot be loaded"),
        ({"one": {"model_type": "bert", "hidden_size": "wide"}}, "cannot be loaded"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(spec(**arguments))


def test_freezing_a_tower_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model has no image tower; it embeds text"):
        build_model(spec(one=TEXT), freeze={"image": True})


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        build_model(spec(one=TEXT), freeze={"text": True})


def test_a_skeleton_has_no_weights() -> None:
    skeleton = load_skeleton(BackboneSource(config=TEXT), trust_remote_code=False)
    assert all(p.device.type == "meta" for p in skeleton.parameters())


SWIN = {
    "model_type": "swin",
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 2,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
BLOOM = {"model_type": "bloom", "vocab_size": 50, "hidden_size": 16, "n_layer": 1, "n_head": 2}
POOLFORMER = {
    "model_type": "poolformer",
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
}


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [(GPT2, "last_token"), (BLOOM, "last_token"), (SWIN, "pooler"), (POOLFORMER, "mean")],
)
def test_no_family_is_pooled_where_it_sees_nothing(settings: dict[str, Any], pooling: str) -> None:
    encoder = build_model(spec(one=settings)).encoder
    assert next(iter(encoder.towers.values())).pooling == pooling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "llava"},
            "model_type llava is a vision-language model that is not offered",
        ),
        ({"model_type": "t5"}, "an encoder-decoder has no single embedding"),
        ({"model_type": "flava"}, "FlavaModel is not built like CLIP"),
    ],
)
def test_families_that_cannot_be_exact_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(spec(one=settings))


def test_coordinate_noise_that_a_chunk_would_share_is_off() -> None:
    model = build_model(spec(one={**DINOV3, "pos_embed_rescale": 2.0})).train()
    pixels = {"image": {"pixel_values": torch.randn(2, 3, 16, 16)}}
    torch.testing.assert_close(model(pixels)["image"], model(pixels)["image"])


def test_what_no_embedding_depends_on_is_marked() -> None:
    settings = {**TEXT, "num_hidden_layers": 1}
    model = build_model(spec(one=settings))
    tower = model.encoder.tower("text")
    tower.backbone.spare = torch.nn.Linear(4, 4)
    found = mark_unreached(model, {"text": {"input_ids": IDS, "attention_mask": MASK}})
    assert found == [
        "encoder.towers.text.backbone.spare.weight",
        "encoder.towers.text.backbone.spare.bias",
    ]
    decay, rest = build_param_groups(model, weight_decay=0.1)
    assert any(p is tower.backbone.spare.weight for p in rest["params"])
    assert not any(p is tower.backbone.spare.weight for p in decay["params"])


def test_a_map_of_features_is_not_pooled_at_its_corner() -> None:
    cvt = {"model_type": "cvt", "embed_dim": [8, 8, 8], "num_heads": [1, 1, 1], "depth": [1, 2, 3]}
    model = build_model(spec(one=cvt), freeze_batch_norm=True)
    assert model.pooling() == {"image": "mean"}
    asked = ModelSpec({"": BackboneSource(config=cvt)}, pooling={"": "cls"})
    with pytest.raises(ConfigError, match=r"CvtModel: cannot be pooled: .*choose mean or pooler"):
        build_model(asked)


def test_a_projection_fits_what_the_model_gives_not_what_its_config_says() -> None:
    opt = {
        "model_type": "opt",
        "vocab_size": 50,
        "hidden_size": 16,
        "word_embed_proj_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 16,
        "max_position_embeddings": 16,
    }
    model = build_model(ModelSpec({"": BackboneSource(config=opt)}, projection_dim=4))
    out = model({"text": {"input_ids": IDS, "attention_mask": MASK}})
    assert out["text"].shape == (2, 4)


def test_a_parameter_of_no_element_is_no_parameter() -> None:
    model = build_model(spec(one=DINOV3))
    assert all(parameter.numel() for parameter in model.parameters())
    assert any("register_tokens" in name for name in model.state_dict())


def test_a_tower_that_no_record_uses_is_not_trained() -> None:
    model = build_model(spec(one=CLIP), used={"text"})
    assert model.trainable("text")
    assert not model.trainable("image")
    with pytest.raises(ConfigError, match="nothing is left to train"):
        build_model(spec(one=CLIP), used={"text"}, freeze={"text": True})


def test_a_model_without_states_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be pooled: .*no attribute 'last_hidden_state'"):
        build_model(spec(one={"model_type": "hgnet_v2"}))


def test_a_model_that_states_no_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="XCLIPModel: its config states no vocab_size"):
        build_model(spec(one={"model_type": "xclip"}))


def limit_of(settings: dict[str, Any]) -> int | None:
    skeleton = load_skeleton(BackboneSource(config=settings), trust_remote_code=False)
    return position_limit(skeleton)


@pytest.mark.parametrize(("settings", "limit"), [(TEXT, 16), (CLIP, 16), (BIT, None)])
def test_position_limit(settings: dict[str, Any], limit: int | None) -> None:
    assert limit_of(settings) == limit


@pytest.mark.parametrize(
    "model_type",
    ["roberta", "luke", "ibert", "roberta-prelayernorm", "xlm-roberta", "mpnet", "camembert"],
)
def test_roberta_and_its_kin_have_fewer_positions_than_they_say(model_type: str) -> None:
    assert limit_of({"model_type": model_type, "max_position_embeddings": 514}) == 512


def test_xlnet_states_no_positions() -> None:
    assert limit_of({"model_type": "xlnet", "n_layer": 1, "d_model": 16, "n_head": 2}) is None


@pytest.mark.parametrize(
    ("stated", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last_token"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        (None, "cls"),
    ],
)
def test_a_sentence_transformers_folder_states_its_pooling(
    tmp_path: Path, stated: dict[str, Any] | None, pooling: str
) -> None:
    save_backbone(tmp_path, TEXT, dropout=0.0, seed=0)
    if stated is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(stated))
    source = ModelSpec({"": BackboneSource(name=str(tmp_path))})
    assert build_model(source).pooling() == {"text": pooling}
    asked = ModelSpec(source.sources, pooling={"": "last_token"})
    assert build_model(asked).pooling() == {"text": "last_token"}


def test_more_modules_than_pooling_are_refused(tmp_path: Path) -> None:
    save_backbone(tmp_path, TEXT, dropout=0.0, seed=0)
    types = ["Transformer", "Pooling", "Dense", "Normalize"]
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in types]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    source = BackboneSource(name=str(tmp_path))
    for pooling in ({}, {"": "mean"}):
        with pytest.raises(ConfigError, match=r"its modules\.json has Dense behind the pooling"):
            build_model(ModelSpec({"": source}, pooling=pooling))
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2] + modules[3:]))
    build_model(ModelSpec({"": source}))


def test_the_stated_length_of_a_sentence_transformers_folder(tmp_path: Path) -> None:
    source = BackboneSource(name=str(tmp_path))
    save_backbone(tmp_path, TEXT, dropout=0.0, seed=0)
    assert stated_length(source) is None
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    assert stated_length(source) == 6


def test_a_stated_pooling_that_is_not_offered_is_refused(tmp_path: Path) -> None:
    save_backbone(tmp_path, TEXT, dropout=0.0, seed=0)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_max_tokens": True})
    )
    with pytest.raises(ConfigError, match="states a pooling that is not offered; set pooling_meth"):
        build_model(ModelSpec({"": BackboneSource(name=str(tmp_path))}))


def test_patches_are_kept_beside_a_class_token_only() -> None:
    kept = ModelSpec({"": BackboneSource(config=IMAGE)}, pooling={"": "none"}, topk_tokens=2)
    model = build_model(kept).eval()
    values, mask = model.encoder.tower("image")({"pixel_values": PIXELS})
    assert values.shape == (2, 3, 16)
    assert mask.all()
    for settings in (TEXT, BIT):
        refused = ModelSpec(
            {"": BackboneSource(config=settings)}, pooling={"": "none"}, topk_tokens=2
        )
        with pytest.raises(ConfigError, match=r"topk_tokens=2: .* has no class token; remove"):
            build_model(refused)
    both = ModelSpec(
        {"text": BackboneSource(config=TEXT), "image": BackboneSource(config=IMAGE)},
        pooling={"text": "none", "image": "none"},
        topk_tokens=2,
    )
    towers = build_model(both).encoder
    assert [towers.tower(part).topk_tokens for part in ("text", "image")] == [None, 2]


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        (
            TEXT,
            (1,),
            r"mrl_layers=\[1\]: BertModel has 2 layers, of which the last must stand last",
        ),
        (TEXT, (1, 3), "has 2 layers, of which"),
        (CLIP, (1, 2), "CLIPModel pools by itself, so inner layers have no embedding"),
        (BIT, (1, 2), "BitModel has None layers"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(
    settings: dict[str, Any], layers: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(ModelSpec({"": BackboneSource(config=settings)}, layers=layers))


@pytest.mark.parametrize("pooling", ["pooler", "mean", "last_token", "none"])
def test_padding_patches_do_not_count(pooling: str) -> None:
    """SigLIP2's NaFlex pads every image to one number of patches, with a mask."""
    torch.manual_seed(0)
    model = build_model(replace(spec(text=TEXT, image=NAFLEX), pooling={"image": pooling}))
    tower = model.encoder.tower("image")
    short = {
        "pixel_values": torch.randn(1, 6, 12),
        "pixel_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "spatial_shapes": torch.tensor([[2, 3]]),
    }
    long = short | {
        "pixel_values": torch.cat([short["pixel_values"], torch.randn(1, 3, 12)], dim=1),
        "pixel_attention_mask": torch.tensor([[1] * 6 + [0] * 3]),
    }
    with torch.no_grad():
        alone, padded = tower.eval()(short), tower.eval()(long)
    if pooling == "none":
        assert padded[1].sum() == 6
        padded = (padded[0][:, :6],)
    torch.testing.assert_close(padded[0], alone[0])


def test_a_naflex_tower_pools_by_itself() -> None:
    model = build_model(spec(one=NAFLEX))
    assert (model.streams, model.encoder.tower("image").pooling) == (("image",), "pooler")
