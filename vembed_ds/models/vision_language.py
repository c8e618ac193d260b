"""One backbone for texts, images and both: a language model that reads images as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vembed_ds.errors import ConfigError
from vembed_ds.models.encoder import (
    Rows,
    TowerEncoder,
    TowersEncoder,
    build_projection,
    in_dtype_of,
)
from vembed_ds.models.families import VISION_LANGUAGE, VisionLanguageFamily, text_config

POOLING = ("last_token", "mean", "none")
SHARED = "item"  # the one tower, in the place of a stream's


class RetrieverTower(TowerEncoder):
    """A late-interaction model that makes its token embeddings itself (ColPali, ColQwen2)."""

    def _tokens(self, inputs: Mapping[str, Tensor]) -> Rows:
        outputs = self.backbone(**in_dtype_of(self, inputs))
        return self._projected(outputs.embeddings), inputs["attention_mask"].bool()


class VisionLanguageEncoder(TowersEncoder):
    """The two streams of one backbone: texts, and images with or without a text.

    Args:
        tower: Embeds both streams.
        family: Which modules of its backbone only images pass through.
    """

    def __init__(self, tower: TowerEncoder, *, family: VisionLanguageFamily) -> None:
        super().__init__({SHARED: tower})
        self.family = family

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of items."""
        return ("text", "image")

    @property
    def streams(self) -> tuple[str, ...]:
        """Items without, and with, an image."""
        return self.parts

    def tower(self, stream: str) -> TowerEncoder:
        """The tower of either stream."""
        return super().tower(SHARED)

    def backbone_modules(self, stream: str) -> list[nn.Module]:
        """The language model for ``text``; for ``image`` what only images pass through."""
        family = self.family
        names = family.text_modules if stream == "text" else family.image_modules
        return [self.tower(stream).backbone.get_submodule(name) for name in names]

    def idle_modules(self, stream: str) -> list[nn.Module]:
        """The language model is never idle: images pass through it, too."""
        return [] if stream == "text" else self.backbone_modules(stream)

    def trainable(self, stream: str) -> bool:
        """Whether any parameter that this stream's embeddings depend on is trained."""
        unused: set[nn.Parameter] = set()
        if stream == "text":
            unused = {p for m in self.backbone_modules("image") for p in m.parameters()}
        parameters = self.tower(stream).parameters()
        return any(p.requires_grad for p in parameters if p not in unused)

    def has_fixed_features(self, part: str) -> bool:
        """Not even where a part of the model is frozen: an item of that kind passes the rest, too."""
        return False

    def forward(self, stream: str, inputs: Mapping[str, Tensor]) -> Rows:
        """Embed a chunk of one stream.

        Args:
            stream: ``text`` or ``image``.
            inputs: ``input_ids`` and ``attention_mask`` ``[n, L]``, padded on the right; for
                images what the family's processor gives besides, of all images of the chunk one
                behind the other.
        """
        return super().forward(SHARED, inputs)


def build_vision_language(
    backbone: nn.Module,
    *,
    pooling: str | None,
    projection_dim: int | None,
    num_layers: int,
) -> VisionLanguageEncoder:
    """The encoder of a vision-language backbone.

    Args:
        backbone: A model of one of :data:`families.VISION_LANGUAGE`.
        pooling: One of :data:`POOLING`; ``None``: ``last_token``, or ``none`` where the model
            gives token embeddings itself.
        projection_dim: Width of a projection behind it; ``None``: none.
        num_layers: Of the projection.

    Raises:
        ConfigError: A pooling that this family does not have.
    """
    config: Any = backbone.config
    family = VISION_LANGUAGE[config.model_type]
    late = family.retriever is not None
    allowed = ("none",) if late else POOLING
    if pooling is not None and pooling not in allowed:
        raise ConfigError(
            f"pooling_method={pooling}: {type(backbone).__name__} has {', '.join(allowed)}"
            + ("" if late else " (its first token has seen nothing of the item)")
            + "; leave pooling_method out"
        )
    width = int(config.embedding_dim if late else text_config(config).hidden_size)
    projection = None
    if projection_dim is not None:
        projection = build_projection(width, projection_dim, num_layers=num_layers)
    kind = RetrieverTower if late else TowerEncoder
    tower = kind(
        backbone,
        pooling=pooling or ("none" if late else "last_token"),
        projection=projection,
        width=width,
    )
    return VisionLanguageEncoder(tower, family=family)
