"""The teachers of a run: loaded, their vectors computed, and asked in every step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from vembed_ds.config.distillation import TeacherEntry, teacher_entries
from vembed_ds.config.schema import Config
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.teacher_items import Instructions, TeacherItems
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.teachers.cache import ensure_cache
from vembed_ds.teachers.ema import EmaTeacher
from vembed_ds.teachers.first_epoch import FirstEpoch
from vembed_ds.teachers.identity import identity_digest, processor_digest
from vembed_ds.teachers.items import distinct_items
from vembed_ds.teachers.precompute import Precomputed, precompute
from vembed_ds.teachers.teacher import Teacher
from vembed_ds.training.data_setup import RunData, loader_timeout
from vembed_ds.training.engine_setup import inference_batch_size
from vembed_ds.training.teacher_loading import load_teacher_of, precision_of, teacher_ds_config
from vembed_ds.training.teacher_sources import (
    CachedTeacher,
    EmaSource,
    FirstEpochTeacher,
    LiveTeacher,
    Source,
    StoredScores,
    Teachers,
    embed_roles,
)

logger = logging.getLogger(__name__)

TEACHERS = "teacher_identities"  # in a checkpoint's state: who they were


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher that is a model of its own.

    Attributes:
        number: Its place in the configuration.
        entry: What is configured.
        teacher: The model in its shards.
    """

    number: int
    entry: TeacherEntry
    teacher: Teacher


def load_teachers(config: Config, data: RunData) -> list[LoadedTeacher]:
    """Load the teachers that are models of their own, in shards. Collective.

    Raises:
        ConfigError: On every rank, when one cannot be loaded, or does not embed what the data holds.
    """
    entries = teacher_entries(config.distillation)
    for entry in entries:  # of all, averages of the student too, before one is loaded
        if not entry.scores:
            teacher_ds_config(entry, precision=precision_of(entry, config))
    return [
        LoadedTeacher(number, entry, load_teacher_of(entry, config, data))
        for number, entry in enumerate(entries)
        if entry.model_name is not None
    ]


def teachers_identity(loaded: Sequence[LoadedTeacher]) -> dict[str, str]:
    """What a resumed run must have the same, by the words of a message; empty without teachers."""
    return {
        f"teacher.{found.entry.name}": identity_digest(found.teacher.identity) for found in loaded
    }


def describe_teachers(loaded: Sequence[LoadedTeacher]) -> dict[str, Any]:
    """Who the teachers were, for a checkpoint's state; their weights are in no checkpoint."""
    if not loaded:
        return {}
    return {TEACHERS: {str(found.entry.name): dict(found.teacher.identity) for found in loaded}}


def prepare_teachers(
    loaded: Sequence[LoadedTeacher],
    config: Config,
    data: RunData,
    *,
    step: int,
    steps_per_epoch: int | None,
) -> Teachers:
    """Compute the vectors of cached teachers, and have items encoded for live ones. Collective.

    Args:
        loaded: From :func:`load_teachers`; a teacher that is not needed any more is closed.
        config: The run's configuration.
        data: The run's; from then on it names image files by their content where a table does.
        step: Optimizer steps already done.
        steps_per_epoch: ``None``: a stream.

    Raises:
        DataError: On every rank, when an item cannot be read, or a cache is another teacher's.
    """
    device = torch.device(get_accelerator().current_device_name())
    entries = teacher_entries(config.distillation)
    sources: dict[int, Source] = {
        number: StoredScores(device) for number, entry in enumerate(entries) if entry.scores
    }
    widths = {}
    for found in loaded:
        widths[found.number] = found.teacher.width
        sources[found.number] = _source(
            found, config, data, step=step, steps_per_epoch=steps_per_epoch, device=device
        )
    return Teachers(sources, widths=widths)


def join_student(
    teachers: Teachers,
    model: EmbeddingModel,
    config: Config,
    *,
    width: int,
    mrl_dims: Sequence[int],
) -> None:
    """Add what needs the student: its averages, and projections to the spaces of its teachers.

    Collective, before the student's engine is made.

    Args:
        teachers: From :func:`prepare_teachers`; completed in place.
        model: Whole, with everything frozen that will be.
        config: The run's configuration.
        width: D, dimensions of an embedding (of one layer's).
        mrl_dims: Prefixes that the loss of any data set compares.
    """
    section = config.distillation
    for number, entry in enumerate(teacher_entries(section)):
        if entry.ema_decay is not None:
            average = EmaTeacher(
                model,
                ds_config=teacher_ds_config(entry, precision=precision_of(entry, config)),
                decay=entry.ema_decay,
            )
            teachers.sources[number] = EmaSource(average, num_layers=model.num_layers)
            teachers.widths[number] = width
    if section.distillation_loss_type != "regression":
        return
    for number, teacher_width in sorted(teachers.widths.items()):
        # Of a Matryoshka prefix, too, the whole of the teacher's embedding is asked for.
        if teacher_width != width or mrl_dims:
            model.add_teacher_projection(number, width=width, teacher_width=teacher_width)


def precompute_teacher(
    teacher: Teacher, config: Config, data: RunData, *, folder: Path
) -> Precomputed:
    """Embed what its table in ``folder`` lacks of the training data. Collective.

    Raises:
        DataError: On every rank, when an item cannot be read, or the table is another teacher's.
    """
    size = inference_batch_size(config)
    return precompute(
        _by_content(data),
        folder=folder,
        identity=teacher.identity,
        processor=teacher.processor,
        instructions=teacher.instructions,
        embed=lambda items: embed_roles(teacher, {"items": items}, batch_size=size)["items"],
        batch_size=size,
        num_workers=config.data.num_workers,
        timeout_seconds=loader_timeout(config),
    )


def cache_folder(config: Config, entry: TeacherEntry) -> Path:
    """Where a cached teacher's vectors are kept."""
    root = config.distillation.teacher_cache or str(Path(config.run.output_dir) / "teacher_cache")
    return Path(root) / str(entry.name)


def _source(
    found: LoadedTeacher,
    config: Config,
    data: RunData,
    *,
    step: int,
    steps_per_epoch: int | None,
    device: torch.device,
) -> Source:
    teacher, mode = found.teacher, found.entry.mode
    folder = cache_folder(config, found.entry)

    def from_table() -> CachedTeacher:
        table, number = precompute_teacher(teacher, config, data, folder=folder)
        logger.info(
            "teacher %s: embedded %d items; %s has %d", teacher.name, number, folder, len(table)
        )
        teacher.close()
        return CachedTeacher(teacher.name, table, teacher.instructions, device)

    if mode == "cached" or (mode == "first_epoch" and step >= (steps_per_epoch or 0)):
        return from_table()
    if mode == "first_epoch":
        table = ensure_cache(folder, identity=teacher.identity)
        distinct = distinct_items(_by_content(data), teacher.instructions)
        if table.has(distinct.keys).all():
            return from_table()
    live = LiveTeacher(teacher, inference_batch_size(config))
    # The student may get stored features in the place of items, which no teacher can read.
    model = config.model
    frozen = model.freeze_text_encoder or model.freeze_image_encoder
    stored = frozen and model.cache_frozen_encoder
    last_epoch = 0 if mode == "first_epoch" else None
    _have_items_encoded(teacher, data, sharing=not stored, last_epoch=last_epoch)
    if mode == "live":
        return live
    assert steps_per_epoch is not None
    return FirstEpochTeacher(
        live, FirstEpoch(table), steps_per_epoch=steps_per_epoch, finish=from_table
    )


def _by_content(data: RunData) -> Sequence[PairDataset]:
    """The tables of the run, which from then on name image files by their content."""
    for member in data.tables:
        member.read_files = True
    return data.tables


def _have_items_encoded(
    teacher: Teacher, data: RunData, *, sharing: bool, last_epoch: int | None
) -> None:
    """Let the loader's processes encode every item for the teacher, too.

    Args:
        teacher: Who reads them.
        data: The run's.
        sharing: Take what is encoded for the student where the teacher would see just the same.
        last_epoch: The last one in which it reads items; ``None``: it always does.
    """
    digest = _digest(data.processor, teacher.parts) if sharing else None
    for member in data.members:
        instructions = Instructions(
            query=member.reader.instruction("query"),
            document=member.reader.instruction("positive"),
        )
        shared = (digest, instructions) == (teacher.identity["processor"], teacher.instructions)
        items = TeacherItems(
            teacher.processor, teacher.instructions, shared=shared, last_epoch=last_epoch
        )
        member.teachers = {**member.teachers, teacher.name: items}


def _digest(processor: ItemProcessor, parts: Sequence[str]) -> str | None:
    """Of what the student's processor makes of items; ``None``: it does not read all kinds."""
    reads = {"text": processor.tokenizer, "image": processor.image_processor}
    if any(reads[part] is None for part in parts):
        return None
    return processor_digest(processor, parts)
