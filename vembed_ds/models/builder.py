"""From a description to a model that can be trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import (
    BackboneSource,
    default_pooling,
    has_class_token,
    kind_of,
    load_backbone,
    probe_backbone,
    refuse_more_modules,
    stated_pooling,
    two_tower_width,
)
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TowerEncoder, TowersEncoder, TwoTowerEncoder, build_projection
from vembed_ds.models.foreign import Tensors
from vembed_ds.models.lora import LoraSpec, add_adapters, merge_adapter_folder
from vembed_ds.models.probe import Probe
from vembed_ds.models.projections import load_projections
from vembed_ds.models.reach import mark_idle
from vembed_ds.models.scalars import demote_empty, is_lifted, lift_scalars
from vembed_ds.models.vision_language import VisionLanguageEncoder, build_vision_language
from vembed_ds.streams import LOGIT_BIAS, LOGIT_SCALE

COMPOSED_PROJECTION_DIM = 512  # the predecessor's default for composed encoders


@dataclass(frozen=True)
class ModelSpec:
    """What the shape of the model depends on.

    Attributes:
        sources: ``{"": source}`` for one backbone, ``{"text": ..., "image": ...}`` for a
            composed encoder.
        pooling: Pooling method of a source; a source that is not named gets its family's.
        prefer_pooler: Whether a backbone's own pooled output wins over ``pooling``, as it did in
            vembed-factory.
        projection_dim: Embedding width behind a projection; ``None``: no projection (composed:
            ``COMPOSED_PROJECTION_DIM``).
        projection_layers: 1 or 2; ``None``: 1, or 2 for a composed encoder.
        projection_files: Stored weights of the projections, by name; see ``projections.py``.
        adapters: Folders of peft adapters that are merged into a source's weights.
        topk_tokens: Patches kept of an image's token embeddings; ``None``: all.
        layers: Layers that are embedded, counted from 1, the last one last (2-D Matryoshka); none:
            the last.
        attn_implementation: Passed to transformers.
        trust_remote_code: Whether code in the model's repository may run.
    """

    sources: Mapping[str, BackboneSource]
    pooling: Mapping[str, str] = field(default_factory=dict)
    prefer_pooler: bool = False
    projection_dim: int | None = None
    projection_layers: int | None = None
    projection_files: Mapping[str, Tensors] = field(default_factory=dict)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    topk_tokens: int | None = None
    layers: tuple[int, ...] = ()
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @property
    def composed(self) -> bool:
        """Whether the encoder is composed of two backbones."""
        return "" not in self.sources


def load_whole(spec: ModelSpec, key: str) -> nn.Module:
    """The backbone of one source with its weights, and with its adapter's merged into them."""
    backbone = load_backbone(
        spec.sources[key],
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    )
    if key in spec.adapters:
        backbone = merge_adapter_folder(backbone, spec.adapters[key])
    return backbone


def build_encoder(
    spec: ModelSpec, *, load: Callable[[ModelSpec, str], nn.Module] = load_whole
) -> TowersEncoder | TwoTowerEncoder:
    """The encoder in float32 on the host, everything trainable.

    Args:
        spec: Its shape and weights.
        load: Gives the backbone of a source; see ``hollow.py`` for another way.

    Raises:
        ConfigError: A backbone cannot be loaded, or does not fit its place; or a stored
            projection.
    """
    encoder = _build_encoder(spec, load)
    load_projections(encoder, spec.projection_files)
    return encoder


def _build_encoder(
    spec: ModelSpec, load: Callable[[ModelSpec, str], nn.Module]
) -> TowersEncoder | TwoTowerEncoder:
    backbones = {key: load(spec, key) for key in spec.sources}
    for backbone in backbones.values():
        lift_scalars(backbone)
        demote_empty(backbone)
    if spec.composed:
        return TowersEncoder({s: _composed_tower(spec, s, b) for s, b in backbones.items()})
    backbone = backbones[""]
    kind = kind_of(backbone)
    if kind == "two_tower":
        return _two_tower(spec, backbone)
    if kind == "vision_language":
        return _vision_language(spec, backbone)
    tower = _tower(
        spec,
        "",
        backbone,
        projection_dim=spec.projection_dim,
        num_layers=spec.projection_layers or 1,
    )
    return TowersEncoder({kind: tower})


def build_model(
    spec: ModelSpec,
    *,
    freeze: Mapping[str, bool] | None = None,
    used: Collection[str] | None = None,
    freeze_batch_norm: bool = False,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
    lora: LoraSpec | None = None,
    load: Callable[[ModelSpec, str], nn.Module] = load_whole,
) -> EmbeddingModel:
    """The model to train.

    Args:
        spec: Its shape and weights.
        freeze: Kinds whose backbone is not trained (a projection behind it still is).
        used: Kinds of items, text or image, that the data has; a tower of the other is not
            trained. ``None``: all.
        freeze_batch_norm: Keep batch normalisation at its stored statistics.
        init_logit_scale: Start of a learned log scale of the similarities; ``None``: fixed, in
            the loss.
        init_logit_bias: Start of a learned bias; ``None``: none.
        lora: Adapters in place of the backbones' weights; projections are trained as ever.
        load: As of :func:`build_encoder`.

    Raises:
        ConfigError: A kind to freeze that the model lacks; nothing left to train; batch
            normalisation that would see chunks instead of the batch.
    """
    encoder = build_encoder(spec, load=load)
    model = EmbeddingModel(
        encoder, init_logit_scale=init_logit_scale, init_logit_bias=init_logit_bias
    )
    for stream in (name for name, frozen in (freeze or {}).items() if frozen):
        _freeze(model, stream)
    for stream in model.parts:
        if used is not None and stream not in used:
            # Its gradient is zero for ever: decay alone would move it.
            idle = model.encoder.idle_modules(stream)
            _keep_fixed(model, idle)
            mark_idle(idle)
    if isinstance(encoder, TwoTowerEncoder):
        _settle_own_scalars(model, encoder)
    if lora is not None:
        add_adapters(model.trained_backbones(), lora)
    _settle_batch_norm(model, frozen=freeze_batch_norm)
    if not any(model.trainable(s) for s in model.parts if used is None or s in used):
        raise ConfigError(
            "freeze_text_encoder, freeze_image_encoder: nothing is left to train; "
            "unfreeze a tower or set projection_dim"
        )
    return model


def _composed_tower(spec: ModelSpec, stream: str, backbone: nn.Module) -> TowerEncoder:
    if kind_of(backbone) != stream:
        raise ConfigError(
            f"{stream}_model_name={spec.sources[stream].describe()}: this is a "
            f"{kind_of(backbone).replace('_', '-')} model, not a {stream} encoder"
        )
    return _tower(
        spec,
        stream,
        backbone,
        projection_dim=spec.projection_dim or COMPOSED_PROJECTION_DIM,
        num_layers=spec.projection_layers or 2,
    )


def _tower(
    spec: ModelSpec, key: str, backbone: nn.Module, *, projection_dim: int | None, num_layers: int
) -> TowerEncoder:
    refuse_more_modules(spec.sources[key], heads=bool(spec.projection_files))
    probe = probe_backbone(backbone)
    pooling = (
        spec.pooling.get(key)
        or stated_pooling(spec.sources[key])
        or default_pooling(backbone, probe)
    )
    if spec.prefer_pooler and probe.has_pooler and pooling != "none":
        pooling = "pooler"
    width = probe.pooled_width(pooling)
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module) and pooling != "pooler":
        # Nothing reads its output: without a gradient, weight decay alone would move it.
        pooler.requires_grad_(False)
    projection = None
    if projection_dim is not None:
        projection = build_projection(width, projection_dim, num_layers=num_layers)
    return TowerEncoder(
        backbone,
        pooling=pooling,
        projection=projection,
        topk_tokens=_kept_patches(spec, backbone, probe, pooling=pooling),
        layers=_inner_layers(spec, backbone, pooling=pooling),
        width=width,
        own_pooler=probe.own_pooler(pooling),
    )


def _kept_patches(
    spec: ModelSpec, backbone: nn.Module, probe: Probe, *, pooling: str
) -> int | None:
    """``topk_tokens``, where this tower is the one that it means.

    Raises:
        ConfigError: No tower has patches and a class token to compare them with.
    """
    if spec.topk_tokens is None or pooling != "none":
        return None
    is_image = kind_of(backbone) == "image"
    if spec.composed and not is_image:
        return None
    if not is_image or not (probe.has_tokens and has_class_token(backbone)):
        raise ConfigError(
            f"topk_tokens={spec.topk_tokens}: keeps the patches of an image that are most like its "
            f"class token, and {type(backbone).__name__} has no class token; remove topk_tokens"
        )
    return spec.topk_tokens


def _inner_layers(spec: ModelSpec, backbone: nn.Module, *, pooling: str) -> tuple[int, ...]:
    """The layers below the last that are embedded too.

    Raises:
        ConfigError: The last one named is not the backbone's, or it has no layers to embed.
    """
    if not spec.layers:
        return ()
    number = getattr(backbone.config, "num_hidden_layers", None)
    if spec.layers[-1] != number or pooling in ("none", "pooler"):
        raise ConfigError(
            f"mrl_layers={list(spec.layers)}: {type(backbone).__name__} has {number} layers, of which "
            "the last must stand last, and is pooled by cls, mean or last_token; correct mrl_layers"
        )
    return spec.layers[:-1]


def _two_tower(spec: ModelSpec, backbone: nn.Module) -> TwoTowerEncoder:
    if spec.layers:
        raise ConfigError(
            f"mrl_layers={list(spec.layers)}: {type(backbone).__name__} pools by itself, so inner "
            "layers have no embedding; remove mrl_layers"
        )
    if spec.pooling.get(""):
        raise ConfigError(
            f"pooling_method={spec.pooling['']}: {type(backbone).__name__} pools by itself; "
            "leave pooling_method out"
        )
    _check_parts(backbone, spec.sources[""])
    projection = None
    if spec.projection_dim is not None:
        projection = build_projection(
            two_tower_width(backbone), spec.projection_dim, num_layers=spec.projection_layers or 1
        )
    return TwoTowerEncoder(backbone, projection=projection)


def _vision_language(spec: ModelSpec, backbone: nn.Module) -> VisionLanguageEncoder:
    if spec.topk_tokens is not None or spec.layers:
        key = "topk_tokens" if spec.topk_tokens is not None else "mrl_layers"
        raise ConfigError(f"{key}: not offered for {type(backbone).__name__}; leave it out")
    refuse_more_modules(spec.sources[""], heads=bool(spec.projection_files))
    return build_vision_language(
        backbone,
        pooling=spec.pooling.get("") or stated_pooling(spec.sources[""]),
        projection_dim=spec.projection_dim,
        num_layers=spec.projection_layers or 1,
    )


def _check_parts(backbone: nn.Module, source: BackboneSource) -> None:
    """Every weight must belong to a tower we know: else it is trained or frozen wrongly."""
    known = {name for names in TwoTowerEncoder.PARTS.values() for name in names}
    owners = {name.split(".")[0] for name, _ in backbone.named_parameters()}
    missing = sorted({names[0] for names in TwoTowerEncoder.PARTS.values()} - owners)
    unknown = sorted(owners - known - {LOGIT_SCALE, LOGIT_BIAS})
    if missing or unknown:
        raise ConfigError(
            f"model {source.describe()}: {type(backbone).__name__} is not built like CLIP "
            f"(missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}), "
            "so its towers cannot be told apart; not supported"
        )


def _freeze(model: EmbeddingModel, stream: str) -> None:
    if stream not in model.parts:
        raise ConfigError(
            f"freeze_{stream}_encoder=true: the model has no {stream} tower; "
            f"it embeds {' and '.join(model.parts)}"
        )
    _keep_fixed(model, model.encoder.backbone_modules(stream))


def _keep_fixed(model: EmbeddingModel, modules: list[nn.Module]) -> None:
    for module in modules:
        module.requires_grad_(False)
        model.keep_in_eval(module)  # fixed features: no dropout in what is not trained


def _settle_own_scalars(model: EmbeddingModel, encoder: TwoTowerEncoder) -> None:
    """A CLIP-like backbone has a scale (and SigLIP a bias) of its own.

    Learned, it is replaced by the model's (and exported under its name); fixed, it is no part
    of the loss and must not move.
    """
    backbone = encoder.backbone
    for name in (LOGIT_SCALE, LOGIT_BIAS):
        parameter = backbone._parameters.get(name)
        if parameter is None:
            continue
        parameter.requires_grad_(False)
        if getattr(model, name) is not None:
            shape = () if is_lifted(backbone, name) else tuple(parameter.shape)
            encoder.replaced_shapes[name] = shape
            del backbone._parameters[name]


def _settle_batch_norm(model: EmbeddingModel, *, frozen: bool) -> None:
    model.train()  # what is kept in evaluation stays there, and with it its stored statistics
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    ]
    if not layers:
        return
    if not frozen:
        raise ConfigError(
            f"freeze_batch_norm=false: the model has {len(layers)} batch normalisation layers "
            f"(first: {layers[0][0]}). Their batch statistics depend on how the batch is cut "
            "into chunks and ranks, so no distributed step can equal the whole batch. Set "
            "freeze_batch_norm: true (keeps the stored statistics) or choose a backbone with "
            "group or layer normalisation (ConvNeXt, BiT, ViT)"
        )
    for _, module in layers:
        model.keep_in_eval(module)
