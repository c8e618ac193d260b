"""What transformers' automatic classes do not know of a family: its class, its parts, its stand-in.

A family is told by the ``model_type`` of its config, never by the name or path of a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, ViTConfig

from vembed_ds.errors import ConfigError, one_line


@dataclass(frozen=True)
class VisionLanguageFamily:
    """A backbone in which one language model reads texts and images alike.

    Attributes:
        image_modules: Paths of the modules that only images pass through.
        text_modules: Paths of the language model, through which every item passes.
        retriever: Name of transformers' class where the model gives one embedding per token by
            itself; such a class is in none of the automatic tables.
    """

    image_modules: tuple[str, ...]
    text_modules: tuple[str, ...]
    retriever: str | None = None


_QWEN = VisionLanguageFamily(("visual",), ("language_model",))
VISION_LANGUAGE = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "colpali": VisionLanguageFamily(
        ("vlm.vision_tower", "vlm.multi_modal_projector"),
        ("vlm.language_model",),
        "ColPaliForRetrieval",
    ),
    "colqwen2": VisionLanguageFamily(
        ("vlm.visual",), ("vlm.language_model",), "ColQwen2ForRetrieval"
    ),
}


def family_of(config: Any) -> VisionLanguageFamily | None:
    """The vision-language family of a config; ``None``: it is of none that is offered."""
    return VISION_LANGUAGE.get(config.model_type)


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model or text tower."""
    inner = getattr(config, "vlm_config", None) or config
    return getattr(inner, "text_config", None) or inner


def refusal(config: Any) -> str | None:
    """Why a family cannot be trained exactly, and what to do; ``None``: nothing is against it."""
    if family_of(config) is None and _reads_images_as_tokens(config):
        return (
            f"model_type {config.model_type} is a vision-language model that is not offered; "
            f"choose one of {', '.join(VISION_LANGUAGE)}"
        )
    if getattr(config, "is_encoder_decoder", False):
        return (
            "an encoder-decoder has no single embedding; use an encoder or a causal language model"
        )
    return None


def _reads_images_as_tokens(config: Any) -> bool:
    names = ("image_token_id", "image_token_index", "vision_start_token_id", "vlm_config")
    return any(getattr(config, name, None) is not None for name in names)


def loading_problem(error: Exception) -> str:
    """Why transformers did not build a model, in one line."""
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, which runs only when trust_remote_code is set; read "
            "that code first"
        )
    if "Weights only load failed" in str(error):  # and torch goes on with how to run it after all
        found = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"its weights are damaged, or hold {found[1] if found else 'more than tensors'}, which is "
            "not loaded, because it could run code; get them as safetensors"
        )
    return one_line(error)


def trainable_config(config: Any) -> Any:
    """The config to build: another family's where the own one is no function of its input.

    ViT-MAE drops three patches in four at random and shuffles the rest, in evaluation too. Its
    encoder without the masking is a ViT with the same parameters, which its authors fine-tune.
    """
    if config.model_type != "vit_mae":
        return config
    shared = ViTConfig().to_dict().keys() & config.to_dict().keys() - {"model_type"}
    return ViTConfig(**{name: getattr(config, name) for name in shared})


def build_from_config(config: Any, **options: Any) -> PreTrainedModel:
    """A model with random weights; ``options`` as for ``AutoModel.from_config``."""
    family = family_of(config)
    if family is None or family.retriever is None:
        return AutoModel.from_config(config, **options)
    options.pop("trust_remote_code", None)
    return getattr(transformers, family.retriever)._from_config(config, **options)


def load_pretrained(folder: str, config: Any, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """A pretrained model, and the names of its tensors that the files do not hold.

    Args:
        folder: Folder or hub name.
        config: From :func:`trainable_config`.
        options: As for ``AutoModel.from_pretrained``.
    """
    family = family_of(config)
    loader: Any = AutoModel
    if family is not None and family.retriever is not None:
        loader = getattr(transformers, family.retriever)
        options.pop("trust_remote_code", None)
    model, found = loader.from_pretrained(
        folder, config=config, output_loading_info=True, **options
    )
    return model, _missing(found)


def load_state(
    config: Any, tensors: Mapping[str, Tensor], **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A model with given weights, and the names of its tensors that these do not hold.

    Args:
        config: From :func:`trainable_config`.
        tensors: By the model's own names.
        options: As for ``AutoModel.from_pretrained``.

    Raises:
        ConfigError: The model has no such tensors; names the first.
    """
    trusted = {"trust_remote_code": options["trust_remote_code"]}
    with torch.device("meta"):
        kind: Any = type(build_from_config(config, **trusted))
    options.pop("trust_remote_code")
    model, found = kind.from_pretrained(
        None, config=config, state_dict=dict(tensors), output_loading_info=True, **options
    )
    if unexpected := sorted(found["unexpected_keys"]):
        raise ConfigError(
            f"the weights do not fit {kind.__name__}: {len(unexpected)} unexpected (first: "
            f"{unexpected[0]}); give the config.json that belongs to them"
        )
    return model, _missing(found)


def _missing(found: Mapping[str, Any]) -> list[str]:
    # transformers adds an untrained pooler to a checkpoint without one; it is not read then.
    return sorted(name for name in found["missing_keys"] if "pooler." not in name)
