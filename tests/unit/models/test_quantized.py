"""4-bit base weights: which layers, what a state dict holds, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel

from tests.parity.data import GPT2, TEXT
from vembed_ds.errors import ConfigError
from vembed_ds.models.lora import LoraSpec, add_adapters
from vembed_ds.models.quantized import is_quantized, quantize_layers

NAME = "encoder.layer.0.intermediate.dense"


def backbone(settings: dict[str, Any] = TEXT, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    rest = {key: value for key, value in settings.items() if key != "model_type"}
    return AutoModel.from_config(AutoConfig.for_model(settings["model_type"], **rest))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError,
        match=r"load_in_4bit=true needs bitsandbytes, .* pip install 'vembed-ds\[qlora\]'",
    ):
        add_adapters([backbone()], LoraSpec(r=2, alpha=2.0, load_in_4bit=True))


def test_transposed_layers_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"load_in_4bit=true: GPT2Model's h\.0\.attn\.c_attn is a Conv1D, and only",
    ):
        add_adapters([backbone(GPT2)], LoraSpec(r=2, alpha=2.0, load_in_4bit=True))


@pytest.fixture
def quantized() -> Any:
    pytest.importorskip("bitsandbytes", reason="the extra `qlora`")
    model = backbone()
    quantize_layers(model, [NAME])
    return model


def test_the_adapted_layers_and_no_others() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `qlora`")
    model = backbone()
    spec = LoraSpec(r=2, alpha=2.0, target_modules=["query", "pooler.dense"], load_in_4bit=True)
    add_adapters([model], spec)
    held = {
        name.removesuffix(".base_layer") for name, m in model.named_modules() if is_quantized(m)
    }
    layers = [f"encoder.layer.{index}.attention.self.query" for index in range(2)]
    assert held == {*layers, "pooler.dense"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_" not in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_with_the_rounded_weight_in_the_inputs_precision(
    quantized: Any, dtype: torch.dtype
) -> None:
    layer = quantized.get_submodule(NAME)
    weight = quantized.state_dict()[f"{NAME}.weight"]
    plain = backbone().get_submodule(NAME).weight
    assert weight.dtype == torch.float32
    assert 0 < (weight - plain).norm() / plain.norm() < 0.25  # 16 levels, not noise
    layer(torch.randn(2, 16))  # as a model is probed in float32 before the engine casts it
    quantized.to(dtype)
    for training in (True, False, True):
        x = torch.randn(3, 16, dtype=dtype, requires_grad=training)
        expected = functional.linear(x, weight.to(dtype), layer.bias)
        torch.testing.assert_close(layer.train(training)(x), expected, rtol=0, atol=0)
        assert layer(x).dtype == dtype


def test_a_state_dict_is_as_without_it(quantized: Any) -> None:
    state = quantized.state_dict()
    assert {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in backbone().state_dict().items()
    }
    fresh: nn.Module = backbone()
    quantize_layers(fresh, [NAME])
    fresh.load_state_dict(state)
    assert torch.equal(fresh.state_dict()[f"{NAME}.weight"], state[f"{NAME}.weight"])


def test_weights_of_another_base_model_are_refused(quantized: Any) -> None:
    other = backbone(seed=1)
    quantize_layers(other, [NAME])
    with pytest.raises(RuntimeError, match=rf"{NAME}.weight: the base model is not the one that"):
        quantized.load_state_dict(other.state_dict())
