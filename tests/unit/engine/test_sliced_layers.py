"""Layers in slices of the batch against whole layers: values, gradients, random numbers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vembed_ds.engine import sliced_layers
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.engine.sliced_layers import FAMILIES, slice_layers
from vembed_ds.errors import ConfigError

# Items, tokens of a text, patches of an image with the class token, and heads: were anything but the
# items sliced, it would show.
N = 5
LAYERS = {
    "hidden_size": 8 * N,
    "num_hidden_layers": 2,
    "num_attention_heads": N,
    "intermediate_size": 56,
}
WORDS = {"vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 0}
WORDS |= {"bos_token_id": 1, "eos_token_id": 2}
PIXELS = {"image_size": 16, "patch_size": 8}
DECODER = {"num_key_value_heads": N, "head_dim": 8}
DISTILBERT = {"dim": 8 * N, "n_layers": 2, "n_heads": N, "hidden_dim": 56}
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
DECODERS = {"qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text"}
TWO_TOWERS, IMAGES = {"clip", "siglip"}, {"vit", "deit", "dinov2"}
CELLS = [
    (family, part)
    for family in sorted(FAMILIES)
    for part in (("text", "image") if family in TWO_TOWERS else ("",))
]


def make(family: str, dropout: float) -> PreTrainedModel:
    rates: dict[str, Any] = dict.fromkeys(RATES, dropout)
    if family in TWO_TOWERS:
        text = {**LAYERS, **WORDS, **rates, "projection_size": 8 * N}
        settings = {"text_config": text, "vision_config": {**LAYERS, **PIXELS, **rates}}
    elif family in IMAGES:
        settings = {**LAYERS, **PIXELS, **rates}
    elif family == "distilbert":
        settings = {**WORDS, **DISTILBERT, **rates, "dropout": dropout}
    else:
        settings = {**LAYERS, **WORDS, **rates, **(DECODER if family in DECODERS else {})}
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(family, **settings)).train()


def inputs_of(family: str, part: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if family in IMAGES or part == "image":
        return {"pixel_values": torch.randn(N, 3, 16, 16)}
    mask = torch.ones(N, N, dtype=torch.long)
    mask[1, 3:] = mask[3, 2:] = 0
    return {"input_ids": torch.randint(3, 50, (N, N)), "attention_mask": mask}


def differentiate(
    model: PreTrainedModel, part: str, inputs: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor], float]:
    """A scalar of the outputs that are no padding, its gradient, and what is drawn next."""
    torch.manual_seed(2)
    if part:
        found: Any = getattr(model, f"get_{part}_features")(**inputs)
        rows = getattr(found, "pooler_output", found)
    else:
        rows = torch.cat(model(**inputs, output_hidden_states=True).hidden_states, dim=-1)
        if "attention_mask" in inputs:
            rows = rows * inputs["attention_mask"][..., None]
    value = (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).square().sum()
    value.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return value.item(), gradients, torch.rand(1).item()


def recording(layer: nn.Module, size: int, forward: Any, hidden: Tensor, *rest: Any) -> Tensor:
    """The same slices, kept by autograd."""
    run = partial(forward.func, *forward.args)
    call = sliced_layers._Call(run, (rest, forward.keywords), size, ())
    return torch.cat([run(hidden[place]) for place, run in call.slices(len(hidden))])


def layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("family", "part"), CELLS)
def test_slices_are_the_whole(family: str, part: str, dropout: float) -> None:
    whole, inputs = make(family, dropout), inputs_of(family, part)
    sliced = copy.deepcopy(whole)
    enable_activation_checkpointing(sliced, mechanism="huggingface", slice_size=2)
    assert layers_of(sliced)
    if dropout:
        for layer in layers_of(whole):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(recording, layer, 2)
    expected, found = differentiate(whole, part, inputs), differentiate(sliced, part, inputs)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    error = sum((found[1][n] - g).square().sum() for n, g in expected[1].items())
    assert error < 1e-10 * sum(g.square().sum() for g in expected[1].values())
    assert found[2] == expected[2]
    assert (found[2] == differentiate(sliced.eval(), part, inputs)[2]) == (not dropout)


def test_frozen_weights_below_and_within() -> None:
    """Nothing that a layer gets needs a gradient; of one layer, only some parameters do."""
    whole, inputs = make("bert", 0.0), inputs_of("bert", "")
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_("layer.1" in name and "bias" in name)
    sliced = copy.deepcopy(whole)
    slice_layers(sliced, size=2)
    expected, found = differentiate(whole, "", inputs)[1], differentiate(sliced, "", inputs)[1]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


def test_a_layer_sees_no_more_items_than_a_slice_has() -> None:
    model, seen = make("bert", 0.0), []
    slice_layers(model, size=2)
    inner = layers_of(model)[0].intermediate

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(len(arguments[0]))

    inner.register_forward_pre_hook(look)
    differentiate(model, "", inputs_of("bert", ""))
    assert seen == 2 * [2, 2, 1]


def test_other_families_are_refused_by_name() -> None:
    model = AutoModel.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigError, match=r"slice_size=2: layers of gpt2 in slices were not com"):
        enable_activation_checkpointing(model, mechanism="huggingface", slice_size=2)
