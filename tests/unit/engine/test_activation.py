"""What is computed again in the backward pass is what was computed before."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from vembed_ds.engine.activation import enable_activation_checkpointing, repeat_all_draws

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])


class Noise(nn.Module):
    """Scales by numbers that Python's and NumPy's generators draw, as remote code may."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (random.random() + np.random.rand())


def gradients(**checkpointing: object) -> list[Tensor]:
    """Of a BERT whose layers draw, from the same random states every time."""
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=16,
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=8,
            hidden_dropout_prob=0.1,
        ),
        add_pooling_layer=False,
    ).train()
    for layer in model.encoder.layer:
        layer.intermediate.dense = nn.Sequential(layer.intermediate.dense, Noise())
    if checkpointing:
        enable_activation_checkpointing(model, **checkpointing)  # type: ignore[arg-type]
    repeat_all_draws(model)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    model(input_ids=IDS).last_hidden_state.square().sum().backward()
    drawn = torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])
    return [drawn, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "checkpointing",
    [
        {"mechanism": "huggingface"},
        {"mechanism": "deepspeed"},
        {"mechanism": "huggingface", "slice_size": 2},
    ],
    ids=str,
)
def test_layers_see_the_numbers_again_that_any_generator_gave(
    monkeypatch: pytest.MonkeyPatch, checkpointing: dict[str, object]
) -> None:
    monkeypatch.setattr("vembed_ds.engine.activation.join_deepspeed", lambda: None)
    monkeypatch.setattr("deepspeed.checkpointing.configure", lambda mpu: None)  # asks for the rank
    for found, expected in zip(gradients(**checkpointing), gradients(), strict=True):
        torch.testing.assert_close(found, expected)
