"""Hugging Face backbones: loading, and what kind of backbone each is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import cached_file

from vembed_ds.errors import ConfigError
from vembed_ds.models.families import (
    build_from_config,
    family_of,
    load_pretrained,
    load_state,
    loading_problem,
    refusal,
    text_config,
    trainable_config,
)
from vembed_ds.models.foreign import Tensors
from vembed_ds.models.probe import Probe, probe_image, probe_text
from vembed_ds.references import resolve_model_reference

BackboneKind = Literal["text", "image", "two_tower", "vision_language"]

_STATED_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last_token",
}
_SENTENCE_TRANSFORMERS = ("Transformer", "Pooling", "Normalize")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/")  # a folder of the hub's cache
# DINOv3 draws one distortion of its coordinates per forward call, for all images of the chunk.
_NOISE_PER_CALL = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")


@dataclass(frozen=True)
class BackboneSource:
    """Where a backbone comes from: exactly one of the two.

    Attributes:
        name: Hub name, local folder or ``package:...`` reference of a pretrained model.
        config: Settings of a model with random weights; holds ``model_type``.
        state: Weights of a named model's kind, in the place of its own.
    """

    name: str | None = None
    config: Mapping[str, Any] | None = None
    state: Tensors | None = None

    def describe(self) -> str:
        """Short text for messages."""
        return self.name if self.name is not None else f"config: {self.config!r}"


def load_backbone(
    source: BackboneSource, *, attn_implementation: str | None, trust_remote_code: bool
) -> nn.Module:
    """The backbone in float32 on the host.

    Args:
        source: What to load.
        attn_implementation: ``eager``, ``sdpa`` or the model's default.
        trust_remote_code: Whether code in the model's repository may run.

    Raises:
        ConfigError: The model cannot be found or built; names the source.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    config = _load_config(source, trust_remote_code=trust_remote_code)
    try:
        if source.state is not None:
            tensors = source.state.read()
            model, missing = load_state(config, tensors, dtype=torch.float32, **options)
        elif source.name is not None:
            folder = resolve_model_reference(source.name)
            model, missing = load_pretrained(folder, config, dtype=torch.float32, **options)
        else:
            model, missing = build_from_config(config, dtype=torch.float32, **options), []
    except ConfigError:
        raise
    except Exception as error:  # transformers raises anything for a wrong config
        raise _not_loadable(source, error) from error
    refuse_missing(source, model, missing)
    return _without_cache(model)


def load_skeleton(
    source: BackboneSource, *, trust_remote_code: bool, attn_implementation: str | None = None
) -> nn.Module:
    """The backbone's modules on the meta device, as float32: what kind it is, without its weights.

    Args:
        source: What to load.
        trust_remote_code: As of :func:`load_backbone`.
        attn_implementation: As of :func:`load_backbone`.

    Raises:
        ConfigError: Its config cannot be found; names the source.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config = _load_config(source, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = build_from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:
        raise _not_loadable(source, error) from error
    return _without_cache(model)


def refuse_missing(source: BackboneSource, model: nn.Module, missing: Sequence[str]) -> None:
    """Weights that the files lack would be random.

    Raises:
        ConfigError: There are some; names the first.
    """
    if missing:
        raise ConfigError(
            f"model {source.describe()}: its files lack {len(missing)} of the weights of "
            f"{type(model).__name__} (first: {missing[0]}), which would be random; "
            "give the files that belong to its config.json"
        )


def _without_cache(model: Any) -> nn.Module:
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # no generation here; the cache would only cost memory
    return model  # type: ignore[no-any-return]


def position_limit(skeleton: nn.Module) -> int | None:
    """Longest text, in tokens, that the model has positions for; ``None``: it does not say.

    Args:
        skeleton: From :func:`load_skeleton`.
    """
    config = text_config(skeleton.config)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:  # XLNet says -1
        return None
    # RoBERTa and its kin count positions from behind the padding token's number.
    offsets = [
        int(module.padding_idx) + 1
        for name, module in skeleton.named_modules()
        if name.endswith("position_embeddings") and _padding(module) is not None
    ]
    return limit - max(offsets, default=0)


def vocabulary_size(skeleton: nn.Module) -> int | None:
    """Number of tokens that the model has embeddings for; ``None``: it does not say."""
    config = text_config(skeleton.config)
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _padding(module: nn.Module) -> Any:
    return getattr(module, "padding_idx", None)


def stated_pooling(source: BackboneSource) -> str | None:
    """The pooling that a sentence-transformers folder states; ``None``: it states none.

    Raises:
        ConfigError: It states one that is not offered.
    """
    file = repository_file(source, "1_Pooling/config.json")
    if file is None:
        return None
    settings = json.loads(file.read_text())
    modes = [key for key in _STATED_POOLING if settings.get(key) is True]
    if mode := settings.get("pooling_mode"):  # newer files name it
        modes = [
            f"pooling_mode_{mode}",
            f"pooling_mode_{mode}_token",
            f"pooling_mode_{mode}_tokens",
        ]
    found = {_STATED_POOLING[key] for key in modes if key in _STATED_POOLING}
    if len(found) != 1:
        raise ConfigError(
            f"model {source.describe()}: {file} states a pooling that is not offered; "
            "set pooling_method"
        )
    return found.pop()


def stated_length(source: BackboneSource) -> int | None:
    """The longest text, in tokens, that a sentence-transformers folder states."""
    file = repository_file(source, "sentence_bert_config.json")
    if file is None:
        return None
    length = json.loads(file.read_text()).get("max_seq_length")
    return length if isinstance(length, int) else None


def refuse_more_modules(source: BackboneSource, *, heads: bool = False) -> None:
    """A trained layer behind the pooling would be dropped without a word.

    Args:
        source: Of the backbone.
        heads: Whether the layers behind the pooling are read as its projection.

    Raises:
        ConfigError: The sentence-transformers folder has modules that are not offered.
    """
    if repository_file(source, "vembed_config.json") is not None:
        return  # it says itself what lies behind the pooling
    file = repository_file(source, "modules.json")
    types = [] if file is None else [entry["type"] for entry in json.loads(file.read_text())]
    names = [name.rpartition(".")[2] for name in types]
    known = (*_SENTENCE_TRANSFORMERS, "Dense") if heads else _SENTENCE_TRANSFORMERS
    if more := [name for name in names if name not in known]:
        raise ConfigError(
            f"model {source.describe()}: its modules.json has {', '.join(more)} behind the pooling, "
            "which is not supported of this model, or not from the hub; give a folder that holds it "
            "whole, or to train the backbone alone, a copy without modules.json"
        )


def repository_file(source: BackboneSource, name: str) -> Path | None:
    """One of the optional files of a folder or hub repository; ``None``: it has none."""
    if source.name is None:
        return None
    file = cached_file(
        resolve_model_reference(source.name),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file)


def cached_revision(source: BackboneSource) -> str | None:
    """The commit of a hub model in the local cache; ``None``: it is in a folder of its own."""
    files = [repository_file(source, name) for name in ("config.json", "adapter_config.json")]
    found = [_SNAPSHOT.search(file.as_posix()) for file in files if file is not None]
    return next((match[1] for match in found if match is not None), None)


def kind_of(backbone: nn.Module) -> BackboneKind:
    """Whether the backbone embeds texts, images, or both: with a tower for each, or with one."""
    if family_of(backbone.config) is not None:
        return "vision_language"
    if hasattr(backbone, "get_text_features") and hasattr(backbone, "get_image_features"):
        return "two_tower"
    return "image" if backbone.main_input_name == "pixel_values" else "text"


def has_class_token(backbone: nn.Module) -> bool:
    """Whether the first state of an image backbone is of a learned token, not of a patch."""
    names = [name for name, _ in backbone.named_parameters()]
    return any("cls_token" in name or "class_" in name for name in names)


def default_pooling(backbone: nn.Module, probe: Probe) -> str:
    """The pooling the family is made for.

    A causal language model has seen the whole text only at the last token. An image backbone
    without a class token among its states would give its corner as the first one, so its own
    pooled output is used, or the mean where it has none. The rest have a first token.
    """
    if kind_of(backbone) == "text":
        return "cls" if probe.first_sees_last else "last_token"
    if probe.has_tokens and has_class_token(backbone):
        return "cls"
    return "pooler" if probe.has_pooler else "mean"


def probe_backbone(backbone: nn.Module) -> Probe:
    """Run a text or image backbone once.

    Raises:
        ConfigError: It does not run on its input alone.
    """
    return probe_text(backbone) if kind_of(backbone) == "text" else probe_image(backbone)


def two_tower_width(backbone: nn.Module) -> int:
    """Width of a CLIP-like backbone's embeddings, read from its config."""
    config: Any = backbone.config
    for holder in (config, getattr(config, "text_config", None)):
        for name in ("projection_dim", "hidden_size"):
            width = getattr(holder, name, None)
            if isinstance(width, int):
                return width
    raise ConfigError(
        f"model_type={config.model_type}: the width of its output is not in its config; "
        "this backbone is not supported"
    )


def _not_loadable(source: BackboneSource, error: Exception) -> ConfigError:
    missing = isinstance(error, OSError) and source.name is not None
    if missing and not Path(resolve_model_reference(str(source.name))).is_dir():
        hint = (
            "no such folder here, so taken as a name on the hub (else give a folder or "
            "package:NAME/folder; HF_HUB_OFFLINE=1 asks its cache only); "
        )
    else:
        hint = ""
    return ConfigError(
        f"model {source.describe()}: cannot be loaded: {hint}{loading_problem(error)}"
    )


def _load_config(source: BackboneSource, *, trust_remote_code: bool) -> Any:
    """The model's config, with what would make an embedding depend on its chunk switched off."""
    try:
        if source.name is not None:
            config = AutoConfig.from_pretrained(
                resolve_model_reference(source.name), trust_remote_code=trust_remote_code
            )
        else:
            settings = dict(source.config or {})
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except Exception as error:
        raise _not_loadable(source, error) from error
    if reason := refusal(config):
        raise ConfigError(f"model {source.describe()}: {reason}")
    config = trainable_config(config)
    for name in _NOISE_PER_CALL:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return config
