"""The section ``distillation``: teachers, and how the student follows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from vembed_ds.config.fields import (
    Decay,
    ModelReference,
    PositiveFloat,
    ScratchModel,
    Section,
    Text,
    as_tuple,
)

Mode = Literal["live", "cached", "first_epoch"]
Precision = Literal["fp32", "bf16", "fp16"]
Share = Annotated[float, Field(ge=0, le=1)]


class TeacherEntry(Section):
    """One of several teachers: a model, an average of the student, or scores; null: as for all."""

    name: Text | None = None
    model_name: ModelReference | None = None
    ema_decay: Decay | None = None
    scores: bool = False
    weight: PositiveFloat = 1.0
    temperature: PositiveFloat | None = None
    mode: Mode | None = None
    ds_config: Text | None = None
    precision: Precision | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None


TeacherEntries = Annotated[tuple[TeacherEntry, ...], BeforeValidator(as_tuple)]


class DistillationConfig(Section):
    """Teachers, and how the student follows them."""

    teacher_model_name: ModelReference | None = Field(
        default=None,
        description="A frozen model that the student follows: a reference as in model_name, or a folder of ours; held in shards over the ranks.",
    )
    teacher_ema_decay: Decay | None = Field(
        default=None,
        description="The teacher is the student's own moving average with this decay, sharded over the ranks; null: no such teacher.",
    )
    teacher_scores: bool = Field(
        default=False,
        description="The teacher's scores stand in the data: columns pos_scores and neg_scores, as in FlagEmbedding.",
    )
    teachers: TeacherEntries = Field(
        default=(),
        description="Instead of the three, several teachers: a list of mappings with one of model_name, ema_decay and scores each, and name, weight (1), temperature, mode, ds_config, precision, query_instruction, document_instruction.",
    )
    teacher_mode: Mode = Field(
        default="live",
        description="live: the teacher embeds every batch; cached: every item once before training, kept on the disk and used by later runs; first_epoch: during the first epoch, kept likewise.",
    )
    teacher_cache: Text | None = Field(
        default=None,
        description="Folder of cached teachers' vectors, which all ranks see and runs may share; null: output_dir/teacher_cache.",
    )
    teacher_ds_config: Text | None = Field(
        default=None,
        description="DeepSpeed's JSON file of the teacher (ZeRO-3, offload_param to CPU, hpZ); null: ds_configs/teacher_zero3.json.",
    )
    teacher_precision: Precision = Field(
        default="fp32", description="Number format of the teacher's weights and activations."
    )
    teacher_trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that a teacher's repository brings, with your rights.",
    )
    teacher_query_instruction: str | None = Field(
        default=None,
        description="Put before the queries' texts for the teacher; null: what its folder states.",
    )
    teacher_document_instruction: str | None = Field(
        default=None, description="The same for positives and negatives."
    )
    teacher_temperature: PositiveFloat | None = Field(
        default=None,
        description="Divides the teacher's similarities, or scores, with kl; null: distillation_temperature.",
    )
    distillation_loss_type: Literal["kl", "mse", "margin_mse", "rank", "regression"] = Field(
        default="kl",
        description="How the student follows: by the distribution of similarities, the similarities, their margins or their order, or by the embeddings through a learned projection. docs/losses.md has formulas and sources.",
    )
    distillation_alpha: Share = Field(
        default=0.5,
        description="Share of the task: alpha * task + (1 - alpha) * distillation, as in vembed-factory.",
    )
    distillation_alpha_end: Share | None = Field(
        default=None,
        description="Its value at the last step, with distillation_alpha_schedule linear or cosine.",
    )
    distillation_alpha_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How distillation_alpha goes to distillation_alpha_end."
    )
    distillation_temperature: PositiveFloat = Field(
        default=1.0, description="Divides the similarities, with kl."
    )
    distillation_scale: PositiveFloat = Field(
        default=20.0, description="Multiplies the student's similarities, with rank."
    )


def teacher_entries(config: DistillationConfig) -> tuple[TeacherEntry, ...]:
    """Every teacher with a name, and with what is set for all where its own is null.

    Args:
        config: The section.
    """
    return tuple(_resolved(entry, config) for entry in config.teachers or _single(config))


def _single(config: DistillationConfig) -> Iterator[TeacherEntry]:
    """The teachers that are configured without a list."""
    if config.teacher_model_name is not None:
        yield TeacherEntry(model_name=config.teacher_model_name)
    if config.teacher_ema_decay is not None:
        yield TeacherEntry(ema_decay=config.teacher_ema_decay)
    if config.teacher_scores:
        yield TeacherEntry(scores=True)


def _resolved(entry: TeacherEntry, config: DistillationConfig) -> TeacherEntry:
    shared = {
        key: getattr(config, f"teacher_{key}")
        for key in (
            *("mode", "ds_config", "precision", "temperature"),
            *("query_instruction", "document_instruction"),
        )
        if getattr(entry, key) is None
    }
    return entry.model_copy(update={**shared, "name": entry.name or _name_of(entry)})


def _name_of(entry: TeacherEntry) -> str:
    if entry.scores:
        return "scores"
    if entry.ema_decay is not None:
        return "ema"
    if isinstance(entry.model_name, ScratchModel):
        return str(entry.model_name.config["model_type"])
    path = Path((entry.model_name or "").removeprefix("package:"))
    # A converted model is often called so, and says nothing by it.
    name = path.parent.name if path.name == "model" and path.parent.name else path.name
    return re.sub(r"[^\w.-]+", "-", name).lstrip(".") or "teacher"
