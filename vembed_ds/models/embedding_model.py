"""The module that is trained: an encoder and what the loss learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from vembed_ds.models.encoder import TowersEncoder, TwoTowerEncoder
from vembed_ds.streams import LOGIT_BIAS, LOGIT_SCALE, mask_name, projection_name


class EmbeddingModel(nn.Module):
    """Embeds every stream of a chunk in one call.

    Args:
        encoder: Embeds one stream at a time.
        init_logit_scale: Start of a learned scale of the similarities, the log of an inverse
            temperature; ``None``: the scale is fixed and belongs to the loss.
        init_logit_bias: Start of a learned bias of the scaled similarities, likewise.
    """

    def __init__(
        self,
        encoder: TowersEncoder | TwoTowerEncoder,
        *,
        init_logit_scale: float | None = None,
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self._kept_in_eval: list[nn.Module] = []
        self.logit_scale = _scalar(init_logit_scale)
        self.logit_bias = _scalar(init_logit_bias)
        self.teacher_projections = nn.ModuleDict()

    def add_teacher_projection(self, number: int, *, width: int, teacher_width: int) -> None:
        """Learn a projection ``[G, D]`` to the space of a teacher; it is no part of the exported model.

        Args:
            number: Of the teacher.
            width: D, dimensions of an embedding.
            teacher_width: G.
        """
        self.teacher_projections[str(number)] = _Matrix(teacher_width, width)

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams the model embeds, in the order in which every rank embeds them."""
        return self.encoder.streams

    @property
    def parts(self) -> tuple[str, ...]:
        """Kinds of items, text and image, that the model has a tower for."""
        return self.encoder.parts

    @property
    def num_layers(self) -> int:
        """Layers that the embeddings hold side by side in training; the last stands last."""
        encoder = self.encoder
        if isinstance(encoder, TwoTowerEncoder):
            return 1
        return 1 + len(encoder.tower(encoder.parts[0]).layers)

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
            return dict.fromkeys(encoder.parts, "the backbone's own")
        return {stream: encoder.tower(stream).pooling for stream in encoder.parts}

    def trained_backbones(self) -> list[nn.Module]:
        """The Hugging Face models inside of which something is trained."""
        encoder = self.encoder
        if isinstance(encoder, TwoTowerEncoder):
            found = [encoder.backbone]
        else:
            found = [encoder.tower(name).backbone for name in encoder.towers]
        return [module for module in found if any(p.requires_grad for p in module.parameters())]

    def forward(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Embed a chunk.

        What the loss learns is an output like the embeddings, so that its gradient takes the same
        way through the engine under every ZeRO stage.

        Args:
            inputs: For each stream of the chunk the encoder's arguments, each ``[n, ...]``.

        Returns:
            For each of these streams ``[n, D]``, not normalised, or ``[n, L, D]`` and under
            ``"<stream>/mask"`` ``[n, L]`` bool; and what the loss learns: ``"logit_scale"`` and
            ``"logit_bias"`` ``[1]``, ``"projection/<teacher's number>"`` ``[G, D]``.
        """
        outputs: dict[str, Tensor] = {}
        for stream, chunk in inputs.items():
            outputs[stream], *mask = self.encoder(stream, chunk)
            if mask:
                outputs[mask_name(stream)] = mask[0]
        for name, parameter in ((LOGIT_SCALE, self.logit_scale), (LOGIT_BIAS, self.logit_bias)):
            if parameter is not None:
                # A tensor of its own: an output that *is* a parameter loses its engine hooks.
                outputs[name] = parameter * 1.0
        for number, projection in self.teacher_projections.items():
            outputs[projection_name(int(number))] = projection()
        return outputs


class _Matrix(nn.Module):
    """A learned matrix as a module, so that ZeRO-3 gathers it when it is called."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Linear(columns, rows, bias=False).weight

    def forward(self) -> Tensor:
        return self.weight * 1.0


def _scalar(value: float | None) -> nn.Parameter | None:
    """Shape ``[1]``: DeepSpeed cannot broadcast a 0-dim parameter."""
    return None if value is None else nn.Parameter(torch.tensor([value]))
