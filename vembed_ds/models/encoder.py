"""Towers: backbone, pooling, optional projection; one for each kind of item, or both in one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vembed_ds.models.pooling import best_patches, pool, token_states
from vembed_ds.similarity import unit_length
from vembed_ds.streams import FEATURES, IMAGE_INPUTS, JOINT

# What the modules give: embeddings, and the mask of token embeddings. A plain tuple, because under
# ZeRO-3 DeepSpeed looks for tensors in a module's output and knows no other containers.
Rows = tuple[Tensor, ...]


class TowerEncoder(nn.Module):
    """Embeds the items of one stream.

    Args:
        backbone: A Hugging Face model.
        pooling: One of ``pooling.POOLING_METHODS``; ``none`` gives one embedding per token.
        projection: From the pooled width to the embedding width; ``None``: no projection.
        topk_tokens: Of an image with pooling ``none``, keep the class token and this many patches
            that are most like it; ``None``: all.
        layers: Numbers of hidden layers (1: behind the first) whose embeddings stand before the
            last layer's, side by side (2-D Matryoshka).
        width: Of the pooled output.
        own_pooler: What the backbone's own pooled output is; see :meth:`Probe.own_pooler`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        pooling: str,
        projection: nn.Module | None,
        topk_tokens: int | None = None,
        layers: tuple[int, ...] = (),
        width: int | None = None,
        own_pooler: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.pooling = pooling
        self.topk_tokens = topk_tokens
        self.layers = layers
        self.width = width
        self.own_pooler = own_pooler

    @property
    def gives_tokens(self) -> bool:
        """Whether an item gets one embedding per token."""
        return self.pooling == "none"

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled backbone output ``[n, H]`` of padded inputs ``[n, ...]``."""
        outputs = self.backbone(**in_dtype_of(self, inputs))
        return pool(outputs, mask_of(inputs), method=self.pooling)

    def forward(self, inputs: Mapping[str, Tensor]) -> Rows:
        """Embed a chunk.

        Args:
            inputs: The backbone's arguments, each ``[n, ...]``, or ``[n, H]`` of
                :data:`FEATURES` when a frozen backbone's features were computed before.

        Returns:
            ``[n, D]``, or ``[n, L, D]`` and their mask ``[n, L]`` bool; in the tower's dtype, not
            normalised.
        """
        if self.gives_tokens:
            return self._tokens(inputs)
        stored = stored_features(in_dtype_of(self, inputs))
        if stored is not None:
            return (self._projected(stored),)
        if not self.layers:
            return (self._projected(self.features(inputs)),)
        outputs = self.backbone(**in_dtype_of(self, inputs), output_hidden_states=True)
        mask = mask_of(inputs)
        states = [outputs.hidden_states[layer] for layer in self.layers]
        pooled = [pool(_States(state), mask, method=self.pooling) for state in states]
        pooled.append(pool(outputs, mask, method=self.pooling))
        return (torch.cat([self._projected(rows) for rows in pooled], dim=-1),)

    def _tokens(self, inputs: Mapping[str, Tensor]) -> Rows:
        outputs = self.backbone(**in_dtype_of(self, inputs))
        tokens, mask = token_states(outputs, mask_of(inputs))
        if self.topk_tokens is not None and "pixel_values" in inputs:
            tokens, mask = best_patches(tokens, mask, number=self.topk_tokens)
        return self._projected(tokens), mask

    def _projected(self, rows: Tensor) -> Tensor:
        return self.projection(rows) if self.projection is not None else rows


def mask_of(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens, or patches, are no padding: ``[n, L]``; ``None``: all."""
    return inputs.get("attention_mask", inputs.get("pixel_attention_mask"))


def stored_features(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """``[n, H]`` that stand in the place of a backbone's inputs; ``None``: it has to run."""
    return next((inputs[name] for name in FEATURES.values() if name in inputs), None)


class _States:
    """Hidden states in the place of a backbone's output."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states


class TowersEncoder(nn.Module):
    """One tower per stream: a text encoder, an image encoder, or a composed pair.

    Args:
        towers: Tower of each stream (``"text"``, ``"image"``).
    """

    def __init__(self, towers: Mapping[str, TowerEncoder]) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of items that have a tower."""
        return tuple(self.towers)

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams this encoder embeds: those of its towers, and items that are both."""
        return (*self.parts, JOINT) if len(self.parts) > 1 else self.parts

    def tower(self, stream: str) -> TowerEncoder:
        """The tower of a stream."""
        tower = self.towers[stream]
        assert isinstance(tower, TowerEncoder)
        return tower

    def backbone_modules(self, stream: str) -> list[nn.Module]:
        """The modules of the backbone that embeds this stream."""
        return [self.tower(stream).backbone]

    def idle_modules(self, stream: str) -> list[nn.Module]:
        """The modules of the backbone that nothing passes through without this stream."""
        return self.backbone_modules(stream)

    def trainable(self, stream: str) -> bool:
        """Whether any parameter that this stream's embeddings depend on is trained."""
        if stream == JOINT:
            return any(self.trainable(part) for part in self.parts)
        return any(parameter.requires_grad for parameter in self.towers[stream].parameters())

    def has_fixed_features(self, part: str) -> bool:
        """Whether :meth:`features` of one item are the same throughout training."""
        tower = self.tower(part)
        one_vector = not tower.gives_tokens and not tower.layers
        return one_vector and is_fixed(self.backbone_modules(part))

    def features(self, part: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """What a backbone gives of padded inputs of texts or images, before a projection: ``[n, H]``."""
        return self.tower(part).features(inputs)

    def forward(self, stream: str, inputs: Mapping[str, Tensor]) -> Rows:
        """Embed a chunk of one stream."""
        if stream == JOINT:
            text, image = split_joint(inputs)
            return fuse(self.tower("text")(text), self.tower("image")(image))
        rows: Rows = self.towers[stream](inputs)
        return rows


class TwoTowerEncoder(nn.Module):
    """A CLIP-like backbone, which has a text and an image tower with projections of its own.

    Args:
        backbone: A Hugging Face model with ``get_text_features`` and ``get_image_features``.
        projection: One more projection behind both towers, or ``None``.

    Attributes:
        replaced_shapes: Shapes of the backbone's own ``logit_scale`` and ``logit_bias`` where
            learned ones of the model have replaced them.
    """

    parts = ("text", "image")
    streams = ("text", "image", JOINT)
    PARTS: ClassVar[dict[str, tuple[str, str]]] = {
        "text": ("text_model", "text_projection"),
        "image": ("vision_model", "visual_projection"),
    }

    def __init__(self, backbone: nn.Module, *, projection: nn.Module | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.replaced_shapes: dict[str, tuple[int, ...]] = {}

    def backbone_modules(self, stream: str) -> list[nn.Module]:
        """The modules of the backbone that only this stream uses."""
        found = [getattr(self.backbone, name, None) for name in self.PARTS[stream]]
        return [module for module in found if isinstance(module, nn.Module)]

    def idle_modules(self, stream: str) -> list[nn.Module]:
        """The modules of the backbone that nothing passes through without this stream."""
        return self.backbone_modules(stream)

    def trainable(self, stream: str) -> bool:
        """Whether any parameter that this stream's embeddings depend on is trained."""
        if stream == JOINT:
            return any(self.trainable(part) for part in self.parts)
        modules = [*self.backbone_modules(stream), *([self.projection] if self.projection else [])]
        return any(p.requires_grad for module in modules for p in module.parameters())

    def has_fixed_features(self, part: str) -> bool:
        """Whether :meth:`features` of one item are the same throughout training."""
        return is_fixed(self.backbone_modules(part))

    def features(self, part: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the backbone gives of padded inputs of texts or images, before our projection: ``[n, H]``."""
        backbone: Any = self.backbone
        encode = backbone.get_text_features if part == "text" else backbone.get_image_features
        outputs = encode(**in_dtype_of(self, inputs))
        embeddings: Tensor = getattr(outputs, "pooler_output", outputs)
        return embeddings

    def forward(self, stream: str, inputs: Mapping[str, Tensor]) -> Rows:
        """Embed a chunk of one stream: ``[n, D]``, not normalised."""
        if stream == JOINT:
            text, image = split_joint(inputs)
            return fuse(self._embed("text", text), self._embed("image", image))
        return self._embed(stream, inputs)

    def _embed(self, part: str, inputs: Mapping[str, Tensor]) -> Rows:
        stored = stored_features(in_dtype_of(self, inputs))
        rows = self.features(part, inputs) if stored is None else stored
        return (self.projection(rows) if self.projection is not None else rows,)


def is_fixed(modules: Iterable[nn.Module]) -> bool:
    """Whether modules compute the same of the same inputs throughout training."""
    every = list(modules)
    trained = any(parameter.requires_grad for module in every for parameter in module.parameters())
    return not trained and not any(part.training for module in every for part in module.modules())


def split_joint(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs of the text and of the image tower."""
    of_images = IMAGE_INPUTS | {FEATURES["image"]}
    image = {name: value for name, value in inputs.items() if name in of_images}
    return {name: value for name, value in inputs.items() if name not in image}, image


def fuse(text: Rows, image: Rows) -> Rows:
    """One embedding of an item that is both: the sum of the two, each of unit norm.

    Its cosine with a third is the mean of the parts' cosines, up to a factor of the item alone
    (score fusion of UniIR, Wei et al. 2023, section 4.1). Of token embeddings all are kept.
    """
    if len(text) == 2:
        return tuple(torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
    unit_text, unit_image = (unit_length(part[0].float()) for part in (text, image))
    return (unit_text + unit_image,)


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


def in_dtype_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating inputs (pixels, features) in the dtype of the module's parameters."""
    dtype = next(module.parameters()).dtype
    return {
        key: value.to(dtype) if torch.is_floating_point(value) else value
        for key, value in inputs.items()
    }
