"""What is compiled is compiled whole, within its bound, or refused by name; never run otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from vembed_ds.errors import ConfigError
from vembed_ds.models import compiled


class Doubling(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values * 2


class Looking(nn.Module):
    """Its way depends on values, so that no single graph holds it."""

    def forward(self, values: Tensor) -> Tensor:
        return values * 2 if bool(values.sum() > 0) else values


@pytest.fixture(autouse=True)
def tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def compile_one(module: nn.Module, *, num_lengths: int = 1) -> Any:
    compiled.compile_in_place([module], num_lengths=num_lengths)
    return module


def test_more_lengths_than_were_planned_end_the_run() -> None:
    module = compile_one(Doubling())
    for length in range(2, 2 + compiled.GRAPHS_PER_LENGTH):
        for number in (2, 3, 5):
            module(torch.ones(number, length))
    with pytest.raises(
        ConfigError,
        match="use_torch_compile=true: Doubling would be compiled more than 4 times; set use_torch_comp",
    ):
        module(torch.ones(2, 9))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(0.5)

    def forward(self, values: Tensor) -> Tensor:
        return self.dropout(self.linear(values))


def test_one_length_is_trained_on_tested_and_evaluated() -> None:
    """The four modes in which a run embeds."""
    module = compile_one(Dropping())
    for training in (True, False):
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient):
                for number in (2, 3):
                    module.train(training)(torch.ones(number, 2))


def test_modules_of_one_class_have_bounds_of_their_own() -> None:
    for module in (compile_one(Doubling()), compile_one(Doubling())):
        for length in range(2, 2 + compiled.GRAPHS_PER_LENGTH):
            module(torch.ones(2, length))


def test_what_is_no_single_graph_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_torch_compile=true: Looking cannot be compiled"):
        compile_one(Looking())(torch.ones(2, 3))


def test_gradients_of_single_items_add_up() -> None:
    """Compiled, those of a class token and of positions would be one tensor, and add up in both."""
    config = AutoConfig.for_model(
        "vit",
        **dict.fromkeys(("hidden_size", "intermediate_size"), 8),
        **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1),
        **{"image_size": 8, "patch_size": 4},
    )
    model = AutoModel.from_config(config).eval()
    images = torch.randn(3, 3, 8, 8)

    def gradients(*chunks: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        for chunk in chunks:
            model(pixel_values=chunk).last_hidden_state[:, 0, 0].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole = gradients(images)
    compile_one(model)
    for name, gradient in gradients(*images.split(1)).items():
        expected = whole.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5, msg=name)
