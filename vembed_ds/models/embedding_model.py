"""The module that is trained: an encoder and, when it is learned, the temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from vembed_ds.models.encoder import TowersEncoder, TwoTowerEncoder

LOGIT_SCALE = "logit_scale"


class EmbeddingModel(nn.Module):
    """Embeds every stream of a chunk in one call.

    Args:
        encoder: Embeds one stream at a time.
        init_temperature: Start of a learned temperature; ``None``: the temperature is fixed
            and belongs to the loss.
    """

    def __init__(
        self, encoder: TowersEncoder | TwoTowerEncoder, *, init_temperature: float | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self._kept_in_eval: list[nn.Module] = []
        self.logit_scale: nn.Parameter | None = None
        if init_temperature is not None:
            # Shape [1]: DeepSpeed cannot broadcast a 0-dim parameter.
            self.logit_scale = nn.Parameter(torch.tensor([-math.log(init_temperature)]))

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams the model embeds, in the order in which every rank embeds them."""
        return self.encoder.streams

    def keep_in_eval(self, module: nn.Module) -> None:
        """Never switch ``module`` to training: no dropout, stored statistics."""
        self._kept_in_eval.append(module)
        module.eval()

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation, but for what stays in evaluation."""
        super().train(mode)
        for module in self._kept_in_eval:
            module.eval()
        return self

    def trainable(self, stream: str) -> bool:
        """Whether any parameter that this stream's embeddings depend on is trained."""
        return self.encoder.trainable(stream)

    def pooling(self) -> dict[str, str]:
        """How each stream's tower pools."""
        encoder = self.encoder
        if isinstance(encoder, TwoTowerEncoder):
            return dict.fromkeys(encoder.streams, "the backbone's own")
        return {stream: encoder.tower(stream).pooling for stream in encoder.streams}

    def trained_backbones(self) -> list[nn.Module]:
        """The Hugging Face models inside of which something is trained."""
        encoder = self.encoder
        if isinstance(encoder, TwoTowerEncoder):
            found = [encoder.backbone]
        else:
            found = [encoder.tower(stream).backbone for stream in encoder.streams]
        return [module for module in found if any(p.requires_grad for p in module.parameters())]

    def forward(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Embed a chunk.

        The temperature is an output like the embeddings, so that its gradient takes the same
        way through the engine under every ZeRO stage.

        Args:
            inputs: For each stream of the chunk the encoder's arguments, each ``[n, ...]``.

        Returns:
            For each of these streams ``[n, D]``, not normalised; and ``"logit_scale"`` ``[1]``
            when the temperature is learned.
        """
        outputs = {stream: self.encoder(stream, chunk) for stream, chunk in inputs.items()}
        if self.logit_scale is not None:
            # A tensor of its own: an output that *is* a parameter loses its engine hooks.
            outputs[LOGIT_SCALE] = self.logit_scale * 1.0
        return outputs
