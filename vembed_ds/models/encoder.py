"""One tower: backbone, pooling, optional projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vembed_ds.models.pooling import pool


class TowerEncoder(nn.Module):
    """Embeds the items of one stream.

    Args:
        backbone: A Hugging Face model.
        pooling: One of ``pooling.POOLING_METHODS``.
        projection: From the pooled width to the embedding width; ``None``: no projection.
    """

    def __init__(self, backbone: nn.Module, *, pooling: str, projection: nn.Module | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.pooling = pooling

    @property
    def backbone_frozen(self) -> bool:
        """Whether the backbone's features of an item never change during training."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled backbone output ``[n, H]`` of padded inputs ``[n, ...]``."""
        outputs = self.backbone(**_in_dtype_of(self, inputs))
        return pool(outputs, inputs.get("attention_mask"), method=self.pooling)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed a chunk.

        Args:
            inputs: The backbone's arguments, each ``[n, ...]``, or ``{"features": [n, H]}``
                when a frozen backbone's features were computed before.

        Returns:
            ``[n, D]`` in the tower's dtype, not normalised.
        """
        if "features" in inputs:
            pooled = _in_dtype_of(self, inputs)["features"]
        else:
            pooled = self.features(inputs)
        return self.projection(pooled) if self.projection is not None else pooled


class TowersEncoder(nn.Module):
    """One tower per stream: a text encoder, an image encoder, or a composed pair.

    Args:
        towers: Tower of each stream (``"text"``, ``"image"``).
    """

    def __init__(self, towers: Mapping[str, TowerEncoder]) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams this encoder embeds."""
        return tuple(self.towers)

    def tower(self, stream: str) -> TowerEncoder:
        """The tower of a stream."""
        tower = self.towers[stream]
        assert isinstance(tower, TowerEncoder)
        return tower

    def backbone_modules(self, stream: str) -> list[nn.Module]:
        """The modules of the backbone that embeds this stream."""
        return [self.tower(stream).backbone]

    def trainable(self, stream: str) -> bool:
        """Whether any parameter that this stream's embeddings depend on is trained."""
        return any(parameter.requires_grad for parameter in self.towers[stream].parameters())

    def forward(self, stream: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed a chunk of one stream: ``[n, D]``."""
        embeddings: Tensor = self.towers[stream](inputs)
        return embeddings


class TwoTowerEncoder(nn.Module):
    """A CLIP-like backbone, which has a text and an image tower with projections of its own.

    Args:
        backbone: A Hugging Face model with ``get_text_features`` and ``get_image_features``.
        projection: One more projection behind both towers, or ``None``.

    Attributes:
        replaced_scale_shape: Shape of the backbone's own ``logit_scale`` where a learned
            temperature has replaced it; ``None`` where nothing was replaced.
    """

    streams = ("text", "image")
    PARTS: ClassVar[dict[str, tuple[str, str]]] = {
        "text": ("text_model", "text_projection"),
        "image": ("vision_model", "visual_projection"),
    }

    def __init__(self, backbone: nn.Module, *, projection: nn.Module | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.replaced_scale_shape: tuple[int, ...] | None = None

    def backbone_modules(self, stream: str) -> list[nn.Module]:
        """The modules of the backbone that only this stream uses."""
        found = [getattr(self.backbone, name, None) for name in self.PARTS[stream]]
        return [module for module in found if isinstance(module, nn.Module)]

    def trainable(self, stream: str) -> bool:
        """Whether any parameter that this stream's embeddings depend on is trained."""
        modules = [*self.backbone_modules(stream), *([self.projection] if self.projection else [])]
        return any(p.requires_grad for module in modules for p in module.parameters())

    def forward(self, stream: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed a chunk of one stream: ``[n, D]``, not normalised."""
        backbone: Any = self.backbone
        encode = backbone.get_text_features if stream == "text" else backbone.get_image_features
        outputs = encode(**_in_dtype_of(self, inputs))
        embeddings: Tensor = getattr(outputs, "pooler_output", outputs)
        return self.projection(embeddings) if self.projection is not None else embeddings


def build_projection(width: int, projection_dim: int, *, num_layers: int) -> nn.Module:
    """A head from ``width`` to ``projection_dim``.

    Args:
        width: Width of the pooled output.
        projection_dim: Width of the embedding.
        num_layers: 1: a matrix. 2: ``Linear, GELU, Linear`` with the hidden width equal to
            ``width`` (the predecessor's composed encoder; same parameter names).
    """
    if num_layers == 1:
        return nn.Linear(width, projection_dim, bias=False)
    return nn.Sequential(
        nn.Linear(width, width), nn.GELU(), nn.Linear(width, projection_dim, bias=False)
    )


def _in_dtype_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating inputs (pixels, features) in the dtype of the module's parameters."""
    dtype = next(module.parameters()).dtype
    return {
        key: value.to(dtype) if torch.is_floating_point(value) else value
        for key, value in inputs.items()
    }
