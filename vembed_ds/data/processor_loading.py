"""Loading tokenizers and image processors, without torchvision, by what their files say."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import cached_file

from vembed_ds.data.augment import ImageAugmentation
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.vision_language import (
    FAMILIES,
    PROCESSOR_FILES,
    build_vision_language_processor,
)
from vembed_ds.errors import ConfigError, one_line
from vembed_ds.streams import IMAGE_INPUTS

NO_LIMIT = 10**6  # tokenizers without a length limit state 1e30
SIGLIP_LENGTH = 64
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
)


def build_item_processor(
    text_source: str | None,
    image_source: str | Mapping[str, Any] | None,
    *,
    max_length: int | None,
    augmentation: ImageAugmentation | None = None,
    text_model_type: str | None = None,
    fallback_length: int | None = None,
    model_config: Any = None,
    trust_remote_code: bool = False,
) -> ItemProcessor:
    """Loads what turns texts and images into model inputs.

    Args:
        text_source: Folder or hub name with a tokenizer; None when there are no texts.
        image_source: Folder or hub name with an image processor, or its settings, which must
            name ``image_processor_type``; None when there are no images.
        max_length: Longest token sequence, in tokens; None for the tokenizer's own limit.
        augmentation: For images in training.
        text_model_type: ``model_type`` of the text model, where ``text_source`` holds only a
            tokenizer.
        fallback_length: Longest token sequence where the tokenizer states none.
        model_config: Config of the Hugging Face model; needed of a vision-language model.
        trust_remote_code: Allow code from the hub to run.

    Returns:
        The processor, tried on one image.

    Raises:
        ConfigError: When something is missing or does not load, the tokenizer has no padding
            token or no limit, or the image processor gives more than ``pixel_values``.
    """
    processor = ItemProcessor(augmentation=augmentation)
    if text_source is not None:
        processor.tokenizer = _load_tokenizer(text_source, trust_remote_code=trust_remote_code)
        processor.pad_to_max_length = _is_siglip(text_source, processor.tokenizer, text_model_type)
        processor.max_length = max_length or _own_limit(
            processor, source=text_source, fallback=fallback_length
        )
    if getattr(model_config, "model_type", None) in FAMILIES:
        return _vision_language(
            processor, text_source, image_source, model_config, trust_remote_code=trust_remote_code
        )
    if image_source is not None:
        processor.image_processor = _load_image_processor(
            image_source, trust_remote_code=trust_remote_code
        )
        _check_image_outputs(processor, source=str(image_source))
    if text_source is None and image_source is None:
        raise ConfigError("neither a tokenizer nor an image processor is named; name a model")
    return processor


def _vision_language(
    texts: ItemProcessor,
    text_source: str | None,
    image_source: str | Mapping[str, Any] | None,
    model_config: Any,
    *,
    trust_remote_code: bool,
) -> ItemProcessor:
    """The processor of one backbone for both, whichever of them the data has."""
    if text_source is None or image_source is None:
        raise ConfigError(
            f"model_type {model_config.model_type}: needs a tokenizer and an image processor, even "
            "for images alone; name a folder that has both"
        )
    if texts.tokenizer.chat_template is None:
        texts.tokenizer.chat_template = _json_file(text_source, "chat_template.json").get(
            "chat_template"
        )
    processor = build_vision_language_processor(
        texts.tokenizer,
        _load_image_processor(image_source, trust_remote_code=trust_remote_code),
        config=model_config,
        files={
            name: json.dumps(content)
            for name in PROCESSOR_FILES
            if (content := _json_file(text_source, name))
        },
        source=text_source,
    )
    processor.max_length, processor.augmentation = texts.max_length, texts.augmentation
    for stream in ("text", "image"):
        processor.filler(stream)
    return processor


def _load_tokenizer(source: str, *, trust_remote_code: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"{source}: no tokenizer can be loaded ({one_line(error)}); "
            "name a folder with tokenizer.json"
        ) from error
    # With nothing but a config.json, transformers builds a tokenizer of special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ConfigError(
            f"{source}: no tokenizer files, only a configuration; name a folder with tokenizer.json"
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"{source}: the tokenizer has no padding token; "
            "set pad_token in its tokenizer_config.json"
        )
    return tokenizer


def _own_limit(processor: ItemProcessor, *, source: str, fallback: int | None) -> int:
    limit = int(processor.tokenizer.model_max_length)
    if limit < NO_LIMIT:
        return limit
    if processor.pad_to_max_length:
        return SIGLIP_LENGTH
    if fallback is not None:
        return fallback
    raise ConfigError(f"{source}: the tokenizer states no longest input; set max_seq_length")


def _is_siglip(source: str, tokenizer: Any, model_type: str | None) -> bool:
    """SigLIP saw only texts padded to full length, without a mask; others must not."""
    settings = tokenizer.init_kwargs
    names = (
        model_type,
        type(tokenizer).__name__,
        settings.get("tokenizer_class"),
        settings.get("processor_class"),
        _json_file(source, "config.json").get("model_type"),
        _json_file(source, "processor_config.json").get("processor_class"),
    )
    return any(str(name).lower().startswith("siglip") for name in names)


def _json_file(source: str, name: str) -> dict[str, Any]:
    """One of the optional files of a folder or hub repository; empty when it has none."""
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _load_image_processor(source: str | Mapping[str, Any], *, trust_remote_code: bool) -> Any:
    if isinstance(source, str):
        return _image_processor_from(source, place=source, trust_remote_code=trust_remote_code)
    if "image_processor_type" not in source:
        raise ConfigError(
            f"processor={dict(source)}: image_processor_type is missing; "
            "add it, for example ViTImageProcessor"
        )
    with tempfile.TemporaryDirectory() as folder:  # so that names resolve as for a real folder
        settings = Path(folder) / "preprocessor_config.json"
        settings.write_text(json.dumps(dict(source)), encoding="utf-8")
        processor = _image_processor_from(
            folder, place=f"processor={dict(source)}", trust_remote_code=False
        )
    _check_settings(processor, source)
    return processor


def _image_processor_from(source: str, *, place: str, trust_remote_code: bool) -> Any:
    try:
        settings = _image_settings(source)
        if str(settings.get("image_processor_type")).startswith("DINOv3ViTImageProcessor"):
            return _vit_substitute(settings)
        return AutoImageProcessor.from_pretrained(
            source, backend="pil", trust_remote_code=trust_remote_code
        )
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"{place}: no image processor can be loaded ({one_line(error)}); "
            "name a folder with preprocessor_config.json or processor_config.json"
        ) from error


def _image_settings(source: str) -> dict[str, Any]:
    nested = _json_file(source, "processor_config.json").get("image_processor")
    return nested or _json_file(source, "preprocessor_config.json")


def _vit_substitute(settings: Mapping[str, Any]) -> Any:
    """DINOv3's own class exists for torchvision only; ViT's does the same three steps."""
    plain = {key: value for key, value in settings.items() if key != "image_processor_type"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preprocessor_config.json"
        path.write_text(json.dumps(plain | {"image_processor_type": "ViTImageProcessor"}))
        return AutoImageProcessor.from_pretrained(folder, backend="pil")


def _check_settings(processor: Any, settings: Mapping[str, Any]) -> None:
    """Refuses unknown settings, which transformers would keep without a word."""
    known = [*processor.valid_kwargs.__annotations__, "image_processor_type"]
    for key in settings:
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"processor {key}={settings[key]!r}: {settings['image_processor_type']} has no "
                f"such setting; the nearest is {nearest}"
            )


def _check_image_outputs(processor: ItemProcessor, *, source: str) -> None:
    """Refuses processors whose outputs are not the same arrays for every image."""
    names = list(processor.image_processor.model_input_names)
    blank: EncodedItem = processor.filler("image")
    shape = blank.inputs["pixel_values"].shape
    if not ((names == ["pixel_values"] and len(shape) == 3) or set(names) == IMAGE_INPUTS):
        raise ConfigError(
            f"{source}: {type(processor.image_processor).__name__} gives {', '.join(names)} with "
            f"pixel_values of shape {shape}; only one [C, H, W] array per image, or NaFlex patches "
            "of SigLIP2, are supported for this model"
        )
