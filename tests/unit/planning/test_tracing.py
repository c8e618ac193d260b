"""What is counted without contents is what a real pass holds, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.parity.families import FAMILIES
from vembed_ds import Encoder
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.hollow import outline_backbone
from vembed_ds.models.lora import LoraSpec
from vembed_ds.planning.activations import ChunkCosts
from vembed_ds.planning.tracing import (
    Inputs,
    LiveBytes,
    fused_kernels,
    trace,
    without_contents,
)

WAYS = ["plain", "recomputing", "adapters"]


def build(folder: Path, way: str, *, weights: bool) -> EmbeddingModel:
    torch.manual_seed(0)
    spec = ModelSpec({"": BackboneSource(name=str(folder))})
    lora = LoraSpec(r=2, alpha=2) if way == "adapters" else None
    options: dict[str, Any] = {} if weights else {"load": outline_backbone}
    model = build_model(spec, lora=lora, **options).train()
    if way == "recomputing":
        for backbone in model.trained_backbones():
            enable_activation_checkpointing(backbone, mechanism="huggingface")
    return model


def inputs_of(model: EmbeddingModel, processor: ItemProcessor, number: int) -> Inputs:
    """Items of one size, but for a text that is shorter."""
    shown = {
        "text": [Item(text="a " * 12)] * (number - 1) + [Item(text="a " * 7)],
        "image": [Item(image=Image.new("RGB", (48, 32)))] * number,
    }
    return {
        part: processor.pad(
            part, [processor.encode(item, origin="", augment_seed=None) for item in shown[part]]
        )
        for part in model.parts
    }


def count_saved(model: EmbeddingModel, inputs: Inputs) -> int:
    """Bytes that autograd says that it saves, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(inputs)
    assert outputs
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["bert", "clip", "vit", "qwen3", "qwen2_vl"])
@pytest.mark.one_in(2)
def test_a_model_without_contents_holds_what_the_real_one_holds(
    family: str, way: str, tmp_path: Path
) -> None:
    FAMILIES[family].save(tmp_path)
    processor = Encoder(tmp_path, device="cpu").processor
    real = build(tmp_path, way, weights=True)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # what is planned has no weights yet
    hollow = build(tmp_path, way, weights=False)
    without_contents(hollow, dtype=torch.float32)
    costs = ChunkCosts(hollow, lambda number: inputs_of(hollow, processor, number), fused=False)
    for number in (16, 24):  # one that is traced, one between
        found = costs.of(number)
        expected = trace(real, lambda: inputs_of(real, processor, number), fused=False)  # noqa: B023
        forward = expected.alive[: expected.forward_operations]
        tolerance = 0 if family != "qwen2_vl" or number == 16 else 0.02  # images one by one
        for name, value in {
            "saved": forward[-1],
            "forward_peak": max(forward),
            "peak": max(expected.summed),
            "first_peak": max(expected.alive),
        }.items():
            assert getattr(found, name) == pytest.approx(value, rel=tolerance, abs=0), name
        if way != "recomputing":  # whose own hooks keep the others from being asked
            assert found.saved == pytest.approx(
                count_saved(real, inputs_of(real, processor, number)), rel=0.1
            )


@pytest.mark.slow
def test_every_family_can_be_counted(tmp_path: Path) -> None:
    for name, family in FAMILIES.items():
        family.save(tmp_path / name)
        processor = Encoder(tmp_path / name, device="cpu").processor
        model = build(tmp_path / name, "plain", weights=False)
        without_contents(model, dtype=torch.bfloat16)
        costs = ChunkCosts(model, lambda n: inputs_of(model, processor, n), fused=True)  # noqa: B023
        assert 0 < costs.of(32).saved < costs.of(64).saved, name
        real = build(tmp_path / name, "plain", weights=True)  # of which all layers are probed
        assert model.pooling() == real.pooling(), name
        assert [p.shape for p in model.parameters()] == [p.shape for p in real.parameters()], name


def test_gradients_count_until_they_are_added() -> None:
    class Layer(nn.Linear):
        def forward(self, inputs: Inputs) -> dict[str, Tensor]:  # type: ignore[override]
            return {"text": super().forward(inputs["text"]["rows"])}

    model = Layer(64, 64, bias=False)
    traced = trace(model, lambda: {"text": {"rows": torch.zeros(2, 64)}}, fused=False)
    assert max(traced.alive) - max(traced.summed) < 64 * 64 * 4
    assert traced.alive[-1] - traced.summed[-1] == 64 * 64 * 4
    assert model.weight.grad is None


def test_dropout_of_an_accelerator_keeps_a_byte_a_value() -> None:
    layer, values = nn.Dropout(0.5), torch.zeros(1000, requires_grad=True)

    def kept() -> int:
        with LiveBytes([values]) as live:
            out = layer(values)
            assert out.requires_grad
            return live.now

    plain = kept()
    with fused_kernels():
        fused = kept()
    assert (plain, fused) == (8000, 5000)
    assert kept() == plain
    with fused_kernels():
        assert layer.eval()(values) is values


def test_masks_that_are_known_are_counted_out() -> None:
    model = nn.Linear(4, 4)
    without_contents(model, dtype=torch.float32)
    mask = torch.tensor([True, False, True])
    with LiveBytes():
        states = model(torch.zeros(3, 4))
        assert states[mask].shape == (2, 4)
        states[mask] = 0.0
        filled = torch.zeros(3, 4)
        filled[:2] = states[:2]  # a real tensor, whose contents nobody looks at
    assert filled.shape == (3, 4)


def test_what_depends_on_values_is_refused() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: Inputs) -> dict[str, Tensor]:
            rows = self.layer(inputs["text"]["rows"])
            return {"text": rows if rows.sum() > 0 else -rows}

    model = Chooses()
    without_contents(model, dtype=torch.float32)
    costs = ChunkCosts(
        model, lambda number: {"text": {"rows": torch.zeros(number, 4)}}, fused=False
    )
    with pytest.raises(ConfigError, match="Chooses: cannot be computed without the items' values"):
        costs.of(2)
