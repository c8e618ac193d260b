"""Every parameter is in one part and one group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.families import FAMILIES
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.hollow import outline_backbone
from vembed_ds.models.lora import LoraSpec
from vembed_ds.planning.parameters import ModelSize, size_of
from vembed_ds.planning.states import Setting, states_of


def size(folder: Path, *, lora: LoraSpec | None = None, in_4_bit: bool = False) -> ModelSize:
    model = build_model(
        ModelSpec({"": BackboneSource(name=str(folder))}, projection_dim=8),
        freeze={"image": True},
        lora=lora,
        load=outline_backbone,
    )
    return size_of(model, weight_decay=0.01, load_in_4bit=in_4_bit)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    FAMILIES["clip"].save(folder)
    return folder


def test_parts_groups_and_frozen_add_up(clip: Path) -> None:
    found = size(clip)
    whole = build_model(
        ModelSpec({"": BackboneSource(name=str(clip))}, projection_dim=8), freeze={"image": True}
    )
    parameters = list(whole.parameters())
    assert found.total == sum(p.numel() for p in parameters)
    assert found.trained == sum(p.numel() for p in parameters if p.requires_grad)
    assert found.largest == max(p.numel() for p in parameters if p.requires_grad)
    assert found.buffer_bytes == sum(b.nbytes for b in whole.buffers())
    parts = {part.name: part for part in found.parts}
    assert list(parts) == ["text tower", "image tower", "projection", "the rest"]
    assert parts["image tower"].trained == 0 < parts["image tower"].frozen
    assert parts["projection"].trained == 12 * 8
    assert sum(part.trained + part.frozen for part in found.parts) == found.total
    assert len(found.groups) == 2  # with weight decay, and without


def test_weights_under_adapters_in_4_bit(clip: Path) -> None:
    lora = LoraSpec(r=2, alpha=2)
    plain, packed = size(clip, lora=lora), size(clip, lora=lora, in_4_bit=True)
    assert packed.total == plain.total
    assert packed.trained == plain.trained
    assert packed.quantized == sum(plain.frozen) - sum(packed.frozen) > 0
    setting = Setting(ranks=1, zero_stage=2)
    saved = states_of(plain, setting).parameters - states_of(packed, setting).parameters
    assert saved == pytest.approx((4 - 0.516) * packed.quantized, rel=0.001)


def test_4_bit_weights_take_what_bitsandbytes_gives_them() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(512, 1024, bias=False, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(
        torch.randn(1024, 512), quant_type="nf4", compress_statistics=True, requires_grad=False
    )
    state = made.to("cpu").weight.quant_state
    held = [made.weight.data, state.absmax, state.state2.absmax]
    expected = sum(tensor.nbytes for tensor in held)
    size = ModelSize(
        parts=(), groups=((1,),), frozen=(), idle=(), quantized=1024 * 512, buffer_bytes=0
    )
    found = states_of(size, Setting(ranks=1, zero_stage=0)).parameters - 4
    assert found == pytest.approx(expected, rel=0.001)
