"""From the configuration to the model and its processor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vembed_ds.config.compat import ENCODER_FAMILIES, family_problem
from vembed_ds.config.fields import ScratchModel
from vembed_ds.config.schema import Config, ModelConfig, OptimizerConfig
from vembed_ds.data.augment import ImageAugmentation
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import RecordReader
from vembed_ds.data.vision_language import VisionLanguageProcessor
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import (
    BackboneSource,
    kind_of,
    load_skeleton,
    position_limit,
    stated_length,
    vocabulary_size,
)
from vembed_ds.models.builder import ModelSpec, build_model, load_whole
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.lora import LoraSpec
from vembed_ds.models.quantized import is_quantized
from vembed_ds.models.saved_folder import (
    SETTINGS_FILE,
    processor_sources,
    read_settings,
    saved_spec,
)
from vembed_ds.references import resolve_model_reference
from vembed_ds.training.loss_setup import learned_scalars

logger = logging.getLogger(__name__)


def model_spec(config: ModelConfig, *, layers: tuple[int, ...] = ()) -> ModelSpec:
    """The shape of the model, as configured.

    Args:
        config: Of the model.
        layers: Layers that are embedded, the last one last; none: the last.
    """
    if config.model_name is not None:
        sources = {"": config.model_name}
    else:
        assert config.text_model_name is not None
        assert config.image_model_name is not None
        sources = {"text": config.text_model_name, "image": config.image_model_name}
    # The one pooling_method of a composed encoder is its text tower's, as in vembed-factory.
    pooled = ["" if "" in sources else "text"]
    if config.pooling_method == "none":
        pooled = list(sources)  # tokens of both towers, or of none
    spec = ModelSpec(
        sources={key: _source(reference) for key, reference in sources.items()},
        pooling=dict.fromkeys(pooled, config.pooling_method) if config.pooling_method else {},
        layers=layers,
        projection_dim=config.projection_dim,
        projection_layers=config.projection_layers,
        topk_tokens=config.topk_tokens or None,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    folder, settings = _saved(config)
    return _continued(spec, folder, settings) if settings else spec


def _saved(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The folder that ``model_name`` names, and what its ``vembed_config.json`` says."""
    if not isinstance(config.model_name, str):
        return "", {}
    folder = resolve_model_reference(config.model_name)
    return folder, read_settings(Path(folder), trust_remote_code=config.trust_remote_code)


def _continued(spec: ModelSpec, folder: str, settings: Mapping[str, Any]) -> ModelSpec:
    """The trained model of a folder, with pooling and heads, where the configuration is silent.

    Raises:
        ConfigError: The configuration asks for another projection than the trained one.
    """
    saved = saved_spec(folder, settings)
    wanted, trained = spec.projection_dim, saved.projection_dim
    if saved.projection_files and wanted not in (None, trained):
        raise ConfigError(
            f"projection_dim={wanted}: {folder} has a trained projection to {trained}; remove "
            f"projection_dim, or remove the projection and {SETTINGS_FILE} from a copy of the folder"
        )
    if not saved.projection_files:
        saved = replace(saved, projection_dim=wanted, projection_layers=spec.projection_layers)
    if spec.pooling:
        wanted_pooling = spec.pooling[""]
        pooled = ["text" if saved.composed else ""]
        if wanted_pooling == "none":
            pooled = list(saved.sources)
        pooling = {**saved.pooling, **dict.fromkeys(pooled, wanted_pooling)}
        saved = replace(saved, pooling=pooling, prefer_pooler=False)
    return replace(
        saved,
        topk_tokens=spec.topk_tokens or saved.topk_tokens,
        layers=spec.layers,
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    )


def lora_spec(config: ModelConfig) -> LoraSpec | None:
    """The adapters, as configured; ``None``: the backbones are trained whole."""
    if not config.use_lora:
        return None
    return LoraSpec(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        modules_to_save=config.lora_modules_to_save or (),
        load_in_4bit=config.load_in_4bit,
    )


def own_rates(config: OptimizerConfig) -> dict[str, float]:
    """The learning rate of every part that has one of its own, as configured."""
    parts = ("text_encoder", "image_encoder", "projection")
    rates = {part: getattr(config, f"{part}_lr") for part in parts}
    return {part: rate for part, rate in rates.items() if rate is not None}


def setup_model(
    config: Config,
    spec: ModelSpec,
    *,
    used: Collection[str],
    zero_stage: int,
    load: Callable[[ModelSpec, str], nn.Module] = load_whole,
) -> EmbeddingModel:
    """The model to train, in float32 on the host; the same on every rank for the same seed.

    Args:
        config: The run's configuration.
        spec: The model's shape.
        used: Kinds of items, text or image, that the data has.
        zero_stage: Of the run.
        load: Gives the backbones; another one gives them without weights.

    Raises:
        ConfigError: The model cannot be built, or not trained exactly so.
    """
    model = config.model
    folder, settings = _saved(model)
    if layout := settings.get("layout"):
        logger.info("model_name: %s is %s", folder, layout)
    scale, bias = learned_scalars(config.loss)
    built = build_model(
        spec,
        freeze={"text": model.freeze_text_encoder, "image": model.freeze_image_encoder},
        used=used,
        freeze_batch_norm=model.freeze_batch_norm,
        init_logit_scale=scale,
        init_logit_bias=bias,
        lora=lora_spec(model),
        load=load,
    )
    if model.precision != "fp32" and any(isinstance(m, _BatchNorm) for m in built.modules()):
        # DeepSpeed casts weights and keeps statistics in float32; batch_norm refuses the mix.
        raise ConfigError(
            f"precision={model.precision}: the model has batch normalisation, whose statistics "
            "stay float32 beside 16-bit weights; use precision: fp32"
        )
    refuse_layer_drop(
        built, zero_stage=zero_stage, gradient_reduction=config.training.gradient_reduction
    )
    refuse_partitioned_4_bit(built, zero_stage=zero_stage)
    return built


def refuse_partitioned_4_bit(model: EmbeddingModel, *, zero_stage: int) -> None:
    """ZeRO-3 would cut the codes of 4-bit weights into pieces, and their layers do not know it.

    Raises:
        ConfigError: The stage is 3 and there is such a layer.
    """
    if zero_stage == 3 and any(map(is_quantized, model.modules())):
        raise ConfigError(
            "load_in_4bit=true: ZeRO stage 3 cannot partition 4-bit weights; use stage 0, 1 or 2, "
            "or set load_in_4bit: false (stage 3 with precision: bf16 spreads the base weights)"
        )


def refuse_layer_drop(
    model: EmbeddingModel, *, zero_stage: int, gradient_reduction: str = "once"
) -> None:
    """Under ZeRO-3, and where ZeRO-2 reduces every chunk, every rank must run every layer.

    Raises:
        ConfigError: The model leaves out layers at random, and ranks would wait for each other.
    """
    per_chunk = zero_stage == 2 and gradient_reduction != "once"
    if (zero_stage == 3 or per_chunk) and (key := _layer_drop(model)):
        waiting = f"gradient_reduction={gradient_reduction}" if per_chunk else "ZeRO-3"
        remedy = "set gradient_reduction: once" if per_chunk else "use ZeRO stage 0 to 2"
        raise ConfigError(
            f"{key}: the model leaves out layers at random, others on every rank, and {waiting} would "
            f"wait for ever for the ranks that leave them out; {remedy}, or a copy of "
            "the model whose config.json says 0"
        )


def _layer_drop(model: EmbeddingModel) -> str | None:
    """A setting of a trained backbone that leaves out whole layers at random."""
    for backbone in model.trained_backbones():
        configs = [backbone.config, *vars(backbone.config).values()]  # of the towers, too
        settings = [vars(config) for config in configs if hasattr(config, "model_type")]
        for key, value in (pair for section in settings for pair in section.items()):
            if key.endswith("layerdrop") and value:
                return f"{key}={value}"
    return None


def setup_processor(
    config: Config, spec: ModelSpec, *, needed: Sequence[RecordReader]
) -> ItemProcessor:
    """Tokenizer and image processor of the model; no weights are loaded.

    Args:
        config: The run's configuration.
        spec: The model's shape.
        needed: Readers of all data sets, which know what the data gives.

    Raises:
        ConfigError: The model has no tower for a role, or its processor cannot be loaded.
    """
    if spec.trust_remote_code:
        _warn_of_remote_code(spec)
    check_family(config.model.encoder_mode, spec)
    sources = _stream_sources(spec)
    for reader, part in ((r, part) for r in needed for part in sorted(r.parts - set(sources))):
        role, column = reader.columns_of(part)[0]
        raise ConfigError(
            f"retrieval_mode={reader.retrieval_mode}: the {role} is of kind {part} (column "
            f"{column!r}), but the model embeds {' and '.join(sources)} only; choose another model "
            "or mode"
        )
    processors = {stream: _processor_source(config, key) for stream, key in sources.items()}
    text_source = processors.get("text")
    if isinstance(text_source, Mapping):
        raise ConfigError(
            "processor: a text model needs the folder or name of a tokenizer, not settings"
        )
    skeleton = None
    if text_source is not None:
        text_model = spec.sources[sources["text"]]
        skeleton = load_skeleton(text_model, trust_remote_code=spec.trust_remote_code)
    limit = None if skeleton is None else position_limit(skeleton)
    stated = None if skeleton is None else stated_length(text_model)
    processor = build_item_processor(
        text_source,
        processors.get("image"),
        max_length=config.model.max_seq_length or stated,
        augmentation=_augmentation(config),
        text_model_type=_text_model_type(spec),
        fallback_length=limit,
        model_config=None if skeleton is None else skeleton.config,
        trust_remote_code=spec.trust_remote_code,
    )
    if skeleton is not None:
        processor.max_length = _within_positions(config, processor, limit)
        _check_vocabulary(processor, text_model, vocabulary_size(skeleton))
    for reader, (role, _) in ((r, pair) for r in needed for pair in r.columns_of("text")):
        _check_room(processor, role=role, instruction=reader.instruction(role))
    if isinstance(processor, VisionLanguageProcessor):
        processor.default_instruction = config.data.prompt or ""
    elif config.data.prompt:
        logger.warning(
            "prompt=%r: has no effect, because the model is no vision-language model; instructions "
            "of other models are query_instruction and document_instruction",
            config.data.prompt,
        )
    return processor


def _warn_of_remote_code(spec: ModelSpec) -> None:
    names = [source.name for source in spec.sources.values() if source.name is not None]
    logger.warning(
        "trust_remote_code=true: Python code in %s, where there is any, runs with your rights",
        " and ".join(names) or "no repository",
    )


def check_family(encoder_mode: str, spec: ModelSpec) -> None:
    """vembed-factory's families name a kind of model; what the model is, its config says."""
    if spec.composed or encoder_mode not in ENCODER_FAMILIES:
        return
    skeleton: Any = load_skeleton(spec.sources[""], trust_remote_code=spec.trust_remote_code)
    kind = kind_of(skeleton)
    problem = family_problem(
        encoder_mode,
        model_type=skeleton.config.model_type,
        kind="vlm" if kind == "vision_language" else kind,
    )
    if problem:
        raise ConfigError(problem)


def _within_positions(config: Config, processor: ItemProcessor, limit: int | None) -> int | None:
    """A text longer than the model has positions for would fail at the step that meets it."""
    wanted = config.model.max_seq_length
    if limit is None or processor.max_length is None:
        return processor.max_length
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"max_seq_length={wanted}: the model has positions for {limit} tokens; set at most that"
        )
    return min(processor.max_length, limit)


def _check_room(processor: ItemProcessor, *, role: str, instruction: str) -> None:
    """What stands around every text must leave room for it, or all texts are the same."""
    if isinstance(processor, VisionLanguageProcessor) or processor.max_length is None:
        return  # a vision-language item without room is an error of its own
    taken = len(processor.tokenizer(instruction, verbose=False)["input_ids"])
    if taken >= processor.max_length:
        key = "query_instruction" if role == "query" else "document_instruction"
        around = f"special tokens and {key} take" if instruction else "special tokens alone take"
        raise ConfigError(
            f"max_seq_length={processor.max_length} (its own, or the model's): {around} {taken} tokens, "
            f"which leaves none for the text of the {role}; raise max_seq_length"
            + (f" or shorten {key}" if instruction else "")
        )


def _check_vocabulary(processor: ItemProcessor, source: BackboneSource, size: int | None) -> None:
    """A token without an embedding would fail at the step that meets it."""
    highest = max(processor.tokenizer.get_vocab().values())
    if size is not None and highest >= size:
        raise ConfigError(
            f"model {source.describe()}: its vocab_size is {size}, but the tokenizer has tokens up to "
            f"number {highest}; give the tokenizer that belongs to the model, or enlarge its vocabulary"
        )


def _source(reference: str | ScratchModel) -> BackboneSource:
    if isinstance(reference, ScratchModel):
        return BackboneSource(config=reference.config)
    return BackboneSource(name=reference)


def _stream_sources(spec: ModelSpec) -> dict[str, str]:
    """For every stream the key of the source that embeds it."""
    if spec.composed:
        return {stream: stream for stream in spec.sources}
    kind = kind_of(load_skeleton(spec.sources[""], trust_remote_code=spec.trust_remote_code))
    return {kind: ""} if kind in ("text", "image") else {"text": "", "image": ""}


def _processor_source(config: Config, key: str) -> str | Mapping[str, Any]:
    """Where the processor of a model reference comes from: beside its weights, or as stated."""
    folder, settings = _saved(config.model)
    if key and settings:
        return processor_sources(folder, settings)[key]
    name = f"{key}_model_name" if key else "model_name"
    reference = getattr(config.model, name)
    if not isinstance(reference, ScratchModel):
        return resolve_model_reference(reference)
    if reference.processor is None:
        raise ConfigError(
            f"{name}.processor: a model that starts from random weights brings no processor; "
            "name a folder with one, or give image processor settings"
        )
    if isinstance(reference.processor, str):
        return resolve_model_reference(reference.processor)
    return reference.processor


def _text_model_type(spec: ModelSpec) -> str | None:
    source = spec.sources.get("text") or spec.sources.get("")
    return None if source is None or source.config is None else source.config["model_type"]


def _augmentation(config: Config) -> ImageAugmentation | None:
    entries = config.data.image_augmentation
    return ImageAugmentation(entries) if entries else None
