"""The model and the loss as everybody without a framework of their own writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, CLIPModel, Qwen2VLModel

from benchmarks.peers.job import CPU, Job, Setting

Inputs = Mapping[str, Tensor]
Gather = Callable[[Tensor], Tensor]


class PlainEncoder(nn.Module):
    """Unit vectors of texts or pictures.

    Of a BERT's texts the mean of the tokens, of CLIP its own projection, of Qwen2-VL the state of
    the last token.
    """

    def __init__(
        self, backbone: nn.Module, *, frozen_text: bool = False, setting: Setting = CPU
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self._setting = setting
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler.requires_grad_(False)  # nothing reads it
        if isinstance(self.backbone, CLIPModel):
            self.backbone.logit_scale.requires_grad_(False)  # the temperature is fixed
            if frozen_text:
                self.backbone.text_model.requires_grad_(False)
                self.backbone.text_projection.requires_grad_(False)

    def forward(self, **inputs: Tensor) -> Tensor:
        """``[n, D]`` of n padded items."""
        bf16 = self._setting.bf16
        with torch.autocast(self._setting.device, torch.bfloat16, enabled=bf16):
            rows = self._embed(inputs)
        return functional.normalize(rows.float() if bf16 else rows, dim=-1)

    def _embed(self, inputs: dict[str, Tensor]) -> Tensor:
        if isinstance(self.backbone, CLIPModel):
            pictures = "pixel_values" in inputs
            embed = (
                self.backbone.get_image_features if pictures else self.backbone.get_text_features
            )
            return embed(**inputs).pooler_output  # type: ignore[no-any-return]
        mask = inputs["attention_mask"]
        if "pixel_values" in inputs:
            inputs = {**inputs, "pixel_values": inputs["pixel_values"].flatten(0, 1)}
        states = self.backbone(**inputs).last_hidden_state
        if isinstance(self.backbone, Qwen2VLModel):
            return states[torch.arange(len(mask)), mask.sum(dim=1) - 1]
        return (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def load_encoder(job: Job) -> PlainEncoder:
    """The job's model, on its device."""
    return load(job.model, frozen_text=job.frozen_text, setting=job.setting)


def load(folder: Path, *, frozen_text: bool, setting: Setting) -> PlainEncoder:
    """From a Hugging Face folder."""
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32)
    encoder = PlainEncoder(backbone, frozen_text=frozen_text, setting=setting)
    return encoder.to(setting.device)


class PairEncoder(nn.Module):
    """Both roles in one forward pass, which is what wrappers of models count by."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, query: Inputs, positive: Inputs) -> tuple[Tensor, Tensor]:
        """``[n, D]`` each."""
        return self.encoder(**query), self.encoder(**positive)


def contrastive(
    query: Tensor,
    positive: Tensor,
    *,
    temperature: float,
    symmetric: bool = False,
    gather: Gather = lambda rows: rows,
    rank: int = 0,
) -> Tensor:
    """InfoNCE of this rank's rows against the columns of all.

    Args:
        query: ``[b, D]``, unit vectors.
        positive: ``[b, D]``.
        temperature: Divides cosines.
        symmetric: Also search queries with positives; the mean of both.
        gather: From ``[b, D]`` to ``[N * b, D]``, with gradient.
        rank: Whose rows they are.
    """
    target = torch.arange(len(query), device=query.device) + rank * len(query)
    loss = functional.cross_entropy(query @ gather(positive).T / temperature, target)
    if symmetric:
        back = functional.cross_entropy(positive @ gather(query).T / temperature, target)
        loss = (loss + back) / 2
    return loss
