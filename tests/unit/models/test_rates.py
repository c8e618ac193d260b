"""Which parameters a part's learning rate reaches, and which parts are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.data import CLIP, IMAGE, TEXT
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.lora import LoraSpec
from vembed_ds.models.rates import set_rates


def build(*, projection_dim: int | None = 6, **options: Any) -> EmbeddingModel:
    given = {name: options.pop(name) for name in ("one", "text", "image") if name in options}
    sources = {k.removeprefix("one"): BackboneSource(config=c) for k, c in given.items()}
    return build_model(ModelSpec(sources, projection_dim=projection_dim), **options)


def rates_by_name(model: EmbeddingModel) -> dict[str, float | None]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_param_groups(model, weight_decay=0.1)
    return {names[id(p)]: group.get("lr") for group in groups for p in group["params"]}


def test_every_part_of_a_composed_encoder() -> None:
    model = build(text=TEXT, image=IMAGE, init_logit_scale=1.0)
    set_rates(model, {"text_encoder": 1.0, "image_encoder": 2.0, "projection": 3.0})
    rates = rates_by_name(model)
    assert rates.pop("logit_scale") is None
    for name, rate in rates.items():
        _, _, tower, part, *_ = name.split(".")
        expected = 3.0 if part == "projection" else {"text": 1.0, "image": 2.0}[tower]
        assert rate == expected, name
    groups = build_param_groups(model, weight_decay=0.1)
    pairs = [(group.get("lr"), group["weight_decay"]) for group in groups]
    both = [(rate, decay) for rate in (1.0, 2.0, 3.0) for decay in (0.0, 0.1)]
    assert pairs[0] == (None, 0.0)  # the temperature: its rate is the one that is logged
    assert sorted(pairs[1:]) == both


def test_the_towers_of_one_backbone_and_their_adapters() -> None:
    model = build(one=CLIP, projection_dim=None, lora=LoraSpec(r=2, alpha=4.0))
    set_rates(model, {"image_encoder": 2.0})
    rates = rates_by_name(model)
    assert len(rates) > 20
    for name, rate in rates.items():
        assert rate == (2.0 if "vision_model" in name else None), name


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("image_encoder", {"one": TEXT}, r"image_encoder_lr=2: the model has none; remove image_"),
        ("projection", {"one": TEXT, "projection_dim": None}, r"projection_lr=2: the model has no"),
        (
            "text_encoder",
            {"text": TEXT, "image": IMAGE, "freeze": {"text": True}},
            r"text_encoder_lr=2: nothing of it is trained; remove text_encoder_lr",
        ),
    ],
)
def test_a_part_without_anything_to_train(part: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_rates(build(**options), {part: 2.0})
