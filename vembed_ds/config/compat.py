"""vembed-factory's keys that have no field of their own here.

Its users' files are accepted as they are. A key that it ignored, or that belongs to accelerate,
FSDP or DDP, is accepted with a notice of what applies instead; a key with a meaning that this
version lacks is refused by name, unless it has the value that switches it off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_IGNORED_TOO = "vembed-factory never read this key, and nothing here does; "
_NEVER_BUILT = (
    "vembed-factory's examples have this key, its code never had what it names and ignored it, as "
    "it is ignored here; for hard negatives set loss_type: in_batch_hard"
)

NOTICES = {
    # Dead in vembed-factory.
    "model_type": _IGNORED_TOO + "the model's own config says what it is",
    "overwrite_output_dir": _IGNORED_TOO + "an earlier run in output_dir is moved to previous-N",
    "save_strategy": _IGNORED_TOO + "save_steps says when to save",
    "max_image_size": _IGNORED_TOO + "the model's image processor decides the size",
    "fp16": _IGNORED_TOO + "precision (or torch_dtype) decides",
    "enable_gather": _IGNORED_TOO + "every loss sees the batch of all ranks",
    # Of accelerate, DDP and FSDP.
    "use_fsdp": "there is no FSDP here; --ds_config ds_configs/zero3.json shards the model, with gradient cache too",
    "num_gpus": "the launcher decides: deepspeed --num_gpus N --module vembed_ds.train ...",
    "ddp_find_unused_parameters": "there is no DDP here; a parameter that a step does not use has gradient zero",
    "debug_gpu_memory": "GPU memory is not limited artificially",
    # Only moved work or wrote reports.
    "enable_image_cache": "images are not kept in memory; the loader's processes read them ahead",
    "validate_data": "it printed a report and changed nothing; vembed-ds validate prints one",
    "skip_invalid_records": "it only changed vembed-factory's report; here a bad record ends the run unless on_bad_record: skip",
    # Documented by vembed-factory without code behind it.
    "project": _IGNORED_TOO + "set the environment variable WANDB_PROJECT",
    "logging_dir": _IGNORED_TOO + "curves are in output_dir/tensorboard",
    "resume": _IGNORED_TOO + "the command's option --resume decides",
    "query_column": _IGNORED_TOO + "name columns by column_mapping: {query: ...}",
    "positive_column": _IGNORED_TOO + "name columns by column_mapping: {positive: ...}",
    "negative_column": _IGNORED_TOO + "name columns by column_mapping: {negatives: ...}",
    "enable_hard_mining": _NEVER_BUILT,
    "lambda_bank": _NEVER_BUILT,
}
"""Keys that are accepted and set nothing, with what applies instead."""

_NOTICED_NAMES = re.compile(
    r"hard_mining_(mode|lambda|temperature|bank_\w+)|bank_(size|dim|momentum)"
)

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "dry_run": ((None, False), "nothing was started; to train, remove dry_run"),
}
"""Keys that set nothing at the values given first, and are refused at others."""

_DTYPES = {
    "float16": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float32": "fp32",
    "fp32": "fp32",
}

NULL_IS_DEFAULT = frozenset(
    [
        *("column_mapping", "image_root", "lr", "mrl_dims", "mrl_weights", "topk_tokens"),
        *("distillation_alpha", "distillation_temperature", "distillation_loss_type"),
    ]
)
"""Keys whose null, which vembed-factory writes for "not set", means their default."""


@dataclass(frozen=True)
class Legacy:
    """What becomes of one key of vembed-factory.

    Attributes:
        name: The key it sets; ``None``: it sets nothing.
        value: The value it sets.
        notice: One line for the user, or ``None``.
        problem: Why the value is refused, or ``None``.
    """

    name: str | None = None
    value: Any = None
    notice: str | None = None
    problem: str | None = None


def translate(key: str, value: Any) -> Legacy | None:
    """What a key of vembed-factory means here; ``None``: it is a key of this project, or unknown.

    Args:
        key: Without its section.
        value: As given.
    """
    if key in REFUSED:
        harmless, problem = REFUSED[key]
        return Legacy(problem=None if value in harmless else problem)
    if key in NOTICES or _NOTICED_NAMES.fullmatch(key):
        # null asks for nothing, so that there is nothing to say either.
        return Legacy(notice=None if value is None else NOTICES.get(key, _NEVER_BUILT))
    if key == "teacher_model_name" and value == "":
        return Legacy()
    if key == "torch_dtype":
        return _translate_dtype(value)
    if key == "attn_implementation" and value == "flash_attention_2":
        return Legacy(
            key,
            "sdpa",
            notice="sdpa is used, as vembed-factory did where the package was missing: it has a "
            "flash kernel of its own on GPUs, and the package's gradient was not compared",
        )
    return None


def _translate_dtype(value: Any) -> Legacy:
    if value is None:
        return Legacy()
    if value == "auto":
        return Legacy(notice="precision decides; weights are kept in float32 unless it is set")
    return Legacy("precision", _DTYPES.get(value, value) if isinstance(value, str) else value)


def needless_model_name(values: Mapping[str, Any]) -> str | None:
    """Why ``model_name`` is not used beside two towers; ``None`` when it is.

    vembed-factory asked for it even where the encoder is composed of two others.

    Args:
        values: Value of each key that was given.
    """
    towers = (values.get("text_model_name"), values.get("image_model_name"))
    if values.get("model_name") is None or None in towers:
        return None
    return "not used: the encoder is composed of text_model_name and image_model_name"


def forced_pooling(values: Mapping[str, Any]) -> str | None:
    """The pooling that the loss asks for, whatever ``pooling_method`` says; ``None``: it asks not.

    Args:
        values: Value of each key that was given.
    """
    return "none" if values.get("loss_type") == "colbert" else None


ENCODER_FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("clip", "siglip"), "two_tower"),
    **dict.fromkeys(("vit", "dino", "dinov2", "dinov3", "mae"), "image"),
    **dict.fromkeys(("bert", "bge", "e5", "qwen", "qwen3_embedding"), "text"),
    **dict.fromkeys(("qwen-vl", "llava", "phi-3-vision", "qwen3_vl", "vlm_generic"), "vlm"),
}
"""vembed-factory's values of ``encoder_mode`` for one backbone, and the kind each stands for."""

_KINDS = {
    "two_tower": "a model with a text and an image tower",
    "image": "an image encoder",
    "text": "a text encoder",
    "vlm": "a vision-language model",
}


def family_problem(encoder_mode: str, *, model_type: str, kind: str) -> str | None:
    """Say that ``encoder_mode`` names another kind of model than the one given.

    What the model is, its own config says; the key only may not contradict it.

    Args:
        encoder_mode: ``auto``, ``composed``, or one of ``ENCODER_FAMILIES``.
        model_type: Of the model's config.
        kind: ``text``, ``image``, ``two_tower`` or ``vlm``.
    """
    stated = ENCODER_FAMILIES.get(encoder_mode)
    if stated is None or stated == kind:
        return None
    return (
        f"encoder_mode={encoder_mode}: names {_KINDS[stated]}, but the model is of "
        f"model_type={model_type}, {_KINDS.get(kind, kind)}; remove encoder_mode (auto: the model's "
        "own config decides), or give another model"
    )
