"""Rules that need more than one key, or the file system; reported together."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pydantic import ValidationError

from vembed_ds.config.datasets import dataset_name, merged_loss
from vembed_ds.config.distillation_rules import DISTILLATION_KEYS, distillation_problems
from vembed_ds.config.fields import ScratchModel
from vembed_ds.config.loss_rules import LOSS_KEYS, loss_problems
from vembed_ds.config.run_rules import RUN_RULES
from vembed_ds.config.schema import Config, DataConfig, DatasetEntry
from vembed_ds.references import reference_problem

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar")
PATTERN = re.compile(r"[*?\[]|\{\d+\.\.\d+\}")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

MODEL_KEYS = ("model_name", "text_model_name", "image_model_name")


def cross_field_problems(config: Config, *, skip: Collection[str] = ()) -> list[str]:
    """Check all rules that a single field cannot.

    Args:
        config: A configuration whose single values are valid.
        skip: Keys already reported as invalid; rules that read them are not checked.

    Returns:
        One sentence per problem, naming key, value, rule and remedy.
    """
    return [
        problem for keys, rule in _RULES if not set(keys) & set(skip) for problem in rule(config)
    ]


def _encoders(config: Config) -> Iterator[str]:
    model = config.model
    towers = (model.text_model_name, model.image_model_name)
    if not _is_composed(config):
        if model.model_name is None:
            yield (
                "model_name: no model given; set model_name, "
                "or text_model_name and image_model_name"
            )
        return
    for key, tower in zip(MODEL_KEYS[1:], towers, strict=True):
        if tower is None:
            yield f"{key}: a composed encoder needs both towers; set {key}"
    if model.model_name is not None:
        yield (
            f"model_name={model.model_name!r}: a composed encoder takes text_model_name and "
            "image_model_name only; remove model_name, or the other two and encoder_mode"
        )


def _is_composed(config: Config) -> bool:
    model = config.model
    towers = (model.text_model_name, model.image_model_name)
    return model.encoder_mode == "composed" or towers != (None, None)


def _references(config: Config) -> Iterator[str]:
    for key in MODEL_KEYS:
        value = getattr(config.model, key)
        if isinstance(value, ScratchModel):
            key, value = f"{key}.processor", value.processor
        if isinstance(value, str) and (problem := reference_problem(value)):
            yield f"{key}={value!r}: {problem}"


def _projection(config: Config) -> Iterator[str]:
    model = config.model
    if model.projection_layers and not model.projection_dim and not _is_composed(config):
        yield (
            f"projection_layers={model.projection_layers}: there is no projection without "
            "projection_dim; set projection_dim, or remove projection_layers"
        )


def _lora(config: Config) -> Iterator[str]:
    model = config.model
    if not model.use_lora:
        for key in ("use_dora", "use_rslora", "load_in_4bit", "lora_modules_to_save"):
            if value := getattr(model, key):
                shown = value if isinstance(value, bool) else list(value)
                yield f"{key}={shown}: has no effect without use_lora; set use_lora: true"
        return
    if model.load_in_4bit and model.use_dora:
        yield (
            "load_in_4bit=True: with use_dora it was not compared with the reference; remove one "
            "of them"
        )
    if model.load_in_4bit and model.precision == "fp16":
        yield (
            "load_in_4bit=True: with precision=fp16 it was not compared with the reference; use "
            "bf16 or fp32"
        )
    if model.gradient_checkpointing and model.activation_checkpointing == "deepspeed":
        yield (
            "activation_checkpointing=deepspeed: with use_lora no input of the first layer needs "
            "a gradient, and this mechanism would give its adapters none; use huggingface"
        )


def _slices(config: Config) -> Iterator[str]:
    model, size = config.model, config.model.gradient_checkpointing_slice_size
    if size is None:
        return
    if not model.gradient_checkpointing:
        yield (
            f"gradient_checkpointing_slice_size={size}: has no effect without "
            "gradient_checkpointing; set gradient_checkpointing: true"
        )
    if model.activation_checkpointing == "deepspeed":
        yield (
            f"gradient_checkpointing_slice_size={size}: slices have a mechanism of their own; remove "
            "activation_checkpointing=deepspeed"
        )
    if model.use_lora:
        yield (
            f"gradient_checkpointing_slice_size={size}: with use_lora it was not compared with the "
            "reference; remove it"
        )


def _reduction(config: Config) -> Iterator[str]:
    model, reduction = config.model, config.training.gradient_reduction
    re_entrant = model.gradient_checkpointing and model.activation_checkpointing == "deepspeed"
    if reduction != "once" and re_entrant:
        yield (
            f"gradient_reduction={reduction}: activation_checkpointing=deepspeed gives the gradient "
            "of a tower in several parts, which ZeRO-2 refuses to reduce; use huggingface"
        )


def _warmup(config: Config) -> Iterator[str]:
    warmup, total = config.optimizer.warmup_steps, config.training.max_steps
    if total is not None and warmup >= total:
        yield (
            f"warmup_steps={warmup}: must be below max_steps={total}; "
            "the learning rate would never be reached"
        )
    if warmup and config.optimizer.scheduler_type == "constant":
        yield (
            f"warmup_steps={warmup}: scheduler_type=constant has no warm-up; "
            "set scheduler_type=constant_with_warmup, or remove warmup_steps"
        )


def _rates(config: Config) -> Iterator[str]:
    for part in ("text_encoder", "image_encoder"):
        rate = getattr(config.optimizer, f"{part}_lr")
        if rate is not None and getattr(config.model, f"freeze_{part}"):
            yield (
                f"{part}_lr={rate:g}: has no effect with freeze_{part}=true; remove one of the two"
            )


def _augmentation(config: Config) -> Iterator[str]:
    if config.data.image_augmentation and config.data.retrieval_mode == "t2t":
        yield (
            "image_augmentation: retrieval_mode=t2t has no images; remove image_augmentation, "
            "or set another retrieval_mode"
        )


def _compiling(config: Config) -> Iterator[str]:
    """What has not been compared with the uncompiled model."""
    if not config.training.use_torch_compile:
        return
    for key in ("gradient_checkpointing", "use_lora"):
        if getattr(config.model, key):
            yield f"use_torch_compile=True: is not offered with {key}; remove one of the two"


def _late_interaction(config: Config) -> Iterator[str]:
    model = config.model
    if model.topk_tokens and model.pooling_method != "none":
        yield (
            f"topk_tokens={model.topk_tokens}: keeps some of the token embeddings, and "
            f"pooling_method={model.pooling_method} gives none; set pooling_method: none, or "
            "topk_tokens: 0"
        )


def _workers(config: Config) -> Iterator[str]:
    data = config.data
    if data.num_workers:
        return
    for key in ("prefetch_factor", "persistent_workers"):
        if key in data.model_fields_set and getattr(data, key):
            yield (
                f"{key}={getattr(data, key)!r}: has no effect with num_workers=0; "
                f"remove {key}, or set num_workers above 0"
            )


def _training_data(config: Config) -> Iterator[str]:
    data = config.data
    if not data.data_path and not data.datasets:
        yield "data_path: required, but not given; set data_path, or datasets for several"
    if data.data_path and data.datasets:
        yield f"data_path={data.data_path!r}: stands beside datasets; keep one of the two"
    yield from _data_problems("data_path", data.data_path or ())


def _datasets(config: Config) -> Iterator[str]:
    entries = config.data.datasets
    for place, entry in enumerate(entries):
        key = f"datasets[{place}]"
        yield from _data_problems(f"{key}.data_path", entry.data_path)
        yield from _data_problems(f"{key}.val_data_path", entry.val_data_path or ())
        if entry.image_root and not Path(entry.image_root).is_dir():
            yield f"{key}.image_root={entry.image_root!r}: no such folder; check the path"
        yield from (f"{key}.loss: {problem}" for problem in _own_loss(config, entry))
        if entry.loss.get("loss_type") == "colbert" and config.model.pooling_method != "none":
            yield (
                f"{key}.loss: loss_type=colbert compares token embeddings, and pooling_method="
                f"{config.model.pooling_method} may give none; set pooling_method: none"
            )
        if entry.loss and config.data.batching != "homogeneous":
            yield (
                f"{key}.loss: a loss of its own needs batches of its own; set batching: "
                "homogeneous, or remove it"
            )
    names = [dataset_name(entry, place) for place, entry in enumerate(entries)]
    if repeated := {name for name in names if names.count(name) > 1}:
        yield f"datasets: {min(repeated)!r} stands there twice; give each a name of its own"


def _own_loss(config: Config, entry: DatasetEntry) -> Iterator[str]:
    """Problems of a data set's own loss settings that the shared ones do not have."""
    if not entry.loss:
        return
    try:
        own = merged_loss(config.loss, entry.loss)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            yield f"{'.'.join(map(str, found['loc']))}={found['input']!r}: {found['msg']}"
        return
    yield from loss_problems(config.model_copy(update={"loss": own}))


def _inner_layers(config: Config) -> Iterator[str]:
    """An item that is both is the sum of two unit vectors, which layers side by side are not."""
    modes = [config.data.retrieval_mode, *(e.retrieval_mode or "" for e in config.data.datasets)]
    both = [mode for mode in modes if {"m", "x"} & set(mode)]
    if config.loss.mrl_layers and both:
        yield (
            f"mrl_layers={list(config.loss.mrl_layers)}: not offered with retrieval_mode={both[0]}, "
            "whose items may be text and image at once; remove mrl_layers"
        )


def _batching(config: Config) -> Iterator[str]:
    if config.data.batching == "homogeneous" and len(config.data.datasets) < 2:
        yield (
            "batching='homogeneous': there is only one data set; remove batching, or list several "
            "under datasets"
        )


def _streaming(config: Config) -> Iterator[str]:
    """What needs to know all records before the first step."""
    data, model = config.data, config.model
    if not data.streaming:
        if data.shuffle_buffer != DataConfig.model_fields["shuffle_buffer"].default:
            yield (
                f"shuffle_buffer={data.shuffle_buffer}: has no effect without streaming; "
                "remove it, or set streaming: true"
            )
        return
    if config.training.max_steps is None:
        yield (
            "streaming=True: how many records there are is not known, so epochs cannot be planned; "
            "set max_steps"
        )
    if data.no_duplicates:
        yield (
            "no_duplicates=True: compares all records before training, which streaming does not "
            "read; remove one of the two (mask_duplicates works)"
        )
    if data.on_bad_record == "skip":
        yield (
            "on_bad_record='skip': tries all records before training, which streaming does not "
            "read; set on_bad_record: fail, or streaming: false"
        )
    if len(data.datasets) > 1:
        yield (
            "datasets: are mixed by their numbers of records, which streaming does not know; give "
            "one data_path, which may be a list, or set streaming: false"
        )
    if model.freeze_text_encoder and model.cache_frozen_encoder:
        yield (
            "cache_frozen_encoder=True: computes the features of all texts before training, which "
            "streaming does not read; set cache_frozen_encoder: false, or streaming: false"
        )
    if config.loss.guide_model_name is not None:
        yield (
            f"guide_model_name={config.loss.guide_model_name!r}: embeds all items before training, "
            "which streaming does not read; remove it, or set streaming: false"
        )


def _validation_data(config: Config) -> Iterator[str]:
    yield from _data_problems("val_data_path", config.data.val_data_path or ())


def _data_problems(key: str, paths: str | tuple[str, ...]) -> Iterator[str]:
    for path in (paths,) if isinstance(paths, str) else paths:
        if problem := _data_problem(Path(path).expanduser(), path):
            yield f"{key}={path!r}: {problem}"


def _data_problem(path: Path, text: str) -> str | None:
    if PATTERN.search(text) and not path.exists():
        return None  # what it means is counted out when the data is read
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    if suffix in DATA_SUFFIXES and not path.exists():
        return "no such file; check the path"
    if path.is_file():
        if suffix not in DATA_SUFFIXES:
            return f"unknown file type; expected one of {', '.join(DATA_SUFFIXES)}"
        return None if path.stat().st_size else "the file is empty; give a file with records"
    if path.is_dir() or HUB_NAME.fullmatch(text):
        return None
    return f"no such folder; give a file ({', '.join(DATA_SUFFIXES)}), a folder or a hub name"


def _image_root(config: Config) -> Iterator[str]:
    root = config.data.image_root
    if root and not Path(root).is_dir():
        yield f"image_root={root!r}: no such folder; check the path"


_RULES: tuple[tuple[tuple[str, ...], Callable[[Config], Iterator[str]]], ...] = (
    ((*MODEL_KEYS, "encoder_mode"), _encoders),
    (MODEL_KEYS, _references),
    (("projection_layers", "projection_dim", *MODEL_KEYS, "encoder_mode"), _projection),
    (
        (
            *("use_lora", "use_dora", "use_rslora", "lora_modules_to_save", "load_in_4bit"),
            "precision",
            *("gradient_checkpointing", "activation_checkpointing"),
        ),
        _lora,
    ),
    (
        (
            *("gradient_checkpointing_slice_size", "gradient_checkpointing"),
            *("activation_checkpointing", "use_lora"),
        ),
        _slices,
    ),
    (
        ("gradient_reduction", "gradient_checkpointing", "activation_checkpointing"),
        _reduction,
    ),
    (("warmup_steps", "max_steps", "scheduler_type"), _warmup),
    (
        (
            *("text_encoder_lr", "freeze_text_encoder"),
            *("image_encoder_lr", "freeze_image_encoder"),
        ),
        _rates,
    ),
    (("image_augmentation", "retrieval_mode"), _augmentation),
    (("use_torch_compile", "gradient_checkpointing", "use_lora"), _compiling),
    (("topk_tokens", "pooling_method"), _late_interaction),
    (LOSS_KEYS, loss_problems),
    (
        (*DISTILLATION_KEYS, "pooling_method", "streaming", "load_in_4bit"),
        distillation_problems,
    ),
    (("num_workers", "prefetch_factor", "persistent_workers"), _workers),
    *RUN_RULES,
    (("data_path", "datasets"), _training_data),
    (("datasets", "batching", "pooling_method", *LOSS_KEYS), _datasets),
    (("batching", "datasets"), _batching),
    (("mrl_layers", "retrieval_mode", "datasets"), _inner_layers),
    (
        (
            *("streaming", "shuffle_buffer", "max_steps", "no_duplicates", "on_bad_record"),
            *("datasets", "freeze_text_encoder", "cache_frozen_encoder", "guide_model_name"),
        ),
        _streaming,
    ),
    (("val_data_path",), _validation_data),
    (("image_root",), _image_root),
)
"""The keys each rule reads, and the rule."""
