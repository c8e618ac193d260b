"""From a configured teacher to a loaded one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from vembed_ds.config.distillation import TeacherEntry
from vembed_ds.config.fields import ScratchModel
from vembed_ds.config.schema import Config
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.distributed import comm
from vembed_ds.engine.ds_config import load_ds_config
from vembed_ds.engine.teacher_config import resolve_teacher_config
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource, kind_of, load_skeleton, position_limit
from vembed_ds.references import resolve_model_reference
from vembed_ds.teachers.teacher import Teacher, load_teacher
from vembed_ds.training.data_setup import RunData

logger = logging.getLogger(__name__)


def load_teacher_of(entry: TeacherEntry, config: Config, data: RunData) -> Teacher:
    """Load one teacher that is a model of its own, in shards. Collective.

    Raises:
        ConfigError: On every rank, when it cannot be loaded, or does not embed what the data holds.
    """
    reference, name = entry.model_name, str(entry.name)
    assert reference is not None
    teacher = load_teacher(
        {"config": reference.config} if isinstance(reference, ScratchModel) else reference,
        name=name,
        ds_config=teacher_ds_config(entry, precision=precision_of(entry, config)),
        query_instruction=entry.query_instruction,
        document_instruction=entry.document_instruction,
        processor=_stated_processor(reference) if isinstance(reference, ScratchModel) else None,
        seed=config.training.seed,
        trust_remote_code=config.distillation.teacher_trust_remote_code,
    )
    _check_fits(teacher, config, data)
    logger.info(
        "teacher %s: instructions %r and %r, %d dimensions",
        name,
        teacher.instructions.query,
        teacher.instructions.document,
        teacher.width,
    )
    return teacher


def teacher_ds_config(entry: TeacherEntry, *, precision: str) -> dict[str, Any]:
    """DeepSpeed's config of a teacher.

    Raises:
        ConfigError: The file is not one, or would train the teacher.
    """
    accelerator = get_accelerator()
    raw = None if entry.ds_config is None else load_ds_config(Path(entry.ds_config))
    return resolve_teacher_config(
        raw,
        origin=entry.ds_config or "the default of teacher_ds_config",
        precision=precision,
        world_size=comm.world_size(),
        device_type=accelerator.device_name(),
        fp16_supported=bool(accelerator.is_fp16_supported()),
        bf16_supported=bool(accelerator.is_bf16_supported()),
    )


def precision_of(entry: TeacherEntry, config: Config) -> str:
    """A teacher's own; of an average, the student's."""
    if entry.ema_decay is not None:
        return config.model.precision
    return str(entry.precision)


def _stated_processor(reference: ScratchModel) -> ItemProcessor:
    """The processor of a model that starts from random weights."""
    skeleton: Any = load_skeleton(BackboneSource(config=reference.config), trust_remote_code=False)
    parts = {"text", "image"} & {kind_of(skeleton)} or {"text", "image"}
    place = reference.processor
    if isinstance(place, str):
        place = resolve_model_reference(place)
    return build_item_processor(
        str(place) if "text" in parts else None,
        place if "image" in parts else None,
        max_length=None,
        fallback_length=position_limit(skeleton) if "text" in parts else None,
        text_model_type=reference.config["model_type"],
        model_config=skeleton.config,
    )


def _check_fits(teacher: Teacher, config: Config, data: RunData) -> None:
    needed = {part for member in data.members for part in member.reader.parts}
    if missing := sorted(needed - set(teacher.parts)):
        raise ConfigError(
            f"teacher {teacher.name!r}: embeds {' and '.join(teacher.parts)} only, and the data "
            f"holds {' and '.join(missing)} too, which the student embeds; choose a teacher that "
            "embeds both"
        )
    if teacher.gives_tokens and config.distillation.distillation_loss_type == "regression":
        raise ConfigError(
            f"distillation_loss_type=regression: teacher {teacher.name!r} gives one vector per "
            "token, and this loss compares one per item; choose another loss or teacher"
        )
