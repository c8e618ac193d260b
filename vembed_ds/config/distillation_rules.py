"""Rules about the section ``distillation`` that need more than one key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vembed_ds.config.distillation import DistillationConfig, TeacherEntry, teacher_entries
from vembed_ds.config.fields import ScratchModel
from vembed_ds.config.schema import Config
from vembed_ds.references import reference_problem

DISTILLATION_KEYS = tuple(DistillationConfig.model_fields)

FOLLOWS_ONE = ("teacher_model_name", "teacher_ema_decay", "teacher_scores")
"""Each makes a teacher without a list."""

NOT_FOR_SCORES = ("mode", "ds_config", "precision", "query_instruction", "document_instruction")
NOT_FOR_EMA = ("mode", "precision", "query_instruction", "document_instruction")

OF_MODELS = (
    *("teacher_mode", "teacher_precision", "teacher_trust_remote_code"),
    *("teacher_query_instruction", "teacher_document_instruction"),
)
"""Of teachers that are models of their own."""

ONLY_WITH = {"distillation_scale": "rank", "teacher_temperature": "kl"}


def distillation_problems(config: Config) -> Iterator[str]:
    """One sentence per problem, naming key, value, rule and remedy."""
    section = config.distillation
    if not teacher_entries(section):
        yield from _without_teacher(section)
        return
    yield from _lists(section)
    yield from _alpha(section)
    yield from _unread_keys(section)
    for place, entry in enumerate(section.teachers):
        yield from _entry(f"teachers[{place}]", entry)
    yield from _vectors_only(config)
    yield from _student(config)
    for place, entry in enumerate(teacher_entries(section)):
        yield from _teacher(config, place, entry)
    yield from _names(section)
    yield from _unused_by_teachers(section)


def _without_teacher(section: DistillationConfig) -> Iterator[str]:
    """Keys that ask for something and get nothing."""
    for key in DISTILLATION_KEYS:
        if (value := getattr(section, key)) != _default(key):
            yield (
                f"{key}={value!r}: there is no teacher; set teacher_model_name, teacher_ema_decay, "
                f"teacher_scores or teachers, or remove {key}"
            )


def _lists(section: DistillationConfig) -> Iterator[str]:
    if not section.teachers:
        return
    for key in FOLLOWS_ONE:
        if (value := getattr(section, key)) != _default(key):
            yield f"{key}={value!r}: stands beside teachers; make it one of the list"
    if sum(entry.ema_decay is not None for entry in section.teachers) > 1:
        yield "teachers: a checkpoint holds one average of the student; keep one ema_decay"


def _alpha(section: DistillationConfig) -> Iterator[str]:
    start, end = section.distillation_alpha, section.distillation_alpha_end
    schedule = section.distillation_alpha_schedule
    if schedule == "constant" and end is not None:
        yield (
            f"distillation_alpha_end={end:g}: distillation_alpha_schedule=constant never gets there; "
            "set it to linear or cosine, or remove distillation_alpha_end"
        )
    if schedule != "constant" and end is None:
        yield (
            f"distillation_alpha_schedule={schedule}: where to is not said; set "
            "distillation_alpha_end"
        )
    if start == 1 and end in (None, 1):
        yield (
            "distillation_alpha=1: is the share of the task, so the teacher would have none; lower "
            "it, or remove the teacher"
        )


def _unread_keys(section: DistillationConfig) -> Iterator[str]:
    chosen = section.distillation_loss_type
    values = {key: getattr(section, key) for key in ONLY_WITH}
    read_by = {
        key: loss_type for key, loss_type in ONLY_WITH.items() if values[key] != _default(key)
    }
    for place, entry in enumerate(section.teachers):
        if entry.temperature is not None:
            key = f"teachers[{place}].temperature"
            values[key], read_by[key] = entry.temperature, "kl"
    for key, loss_type in read_by.items():
        if chosen != loss_type:
            yield (
                f"{key}={values[key]!r}: distillation_loss_type={chosen} does not use it; remove "
                f"{key}, or set distillation_loss_type: {loss_type}"
            )


def _entry(key: str, entry: TeacherEntry) -> Iterator[str]:
    """What an entry of the list says itself."""
    sources = [
        *(["model_name"] if entry.model_name is not None else []),
        *(["ema_decay"] if entry.ema_decay is not None else []),
        *(["scores"] if entry.scores else []),
    ]
    if len(sources) != 1:
        found = " and ".join(sources) or "none of them"
        yield f"{key}: expected one of model_name, ema_decay and scores, found {found}; give one"
    for source, keys in (("scores", NOT_FOR_SCORES), ("ema_decay", NOT_FOR_EMA)):
        if sources != [source]:
            continue
        for name in keys:
            if (value := getattr(entry, name)) is not None:
                yield f"{key}.{name}={value!r}: has no effect with {source}; remove it"


def _vectors_only(config: Config) -> Iterator[str]:
    """What regression, which compares one vector per item, does not go together with."""
    section = config.distillation
    if section.distillation_loss_type != "regression":
        return
    for entry in teacher_entries(section):
        if entry.scores:
            yield (
                f"distillation_loss_type=regression: teacher {entry.name!r} gives scores, and this "
                "loss compares embeddings; choose another loss"
            )
    if config.model.pooling_method == "none":
        yield (
            "distillation_loss_type=regression: compares one vector per item, and pooling_method="
            "none gives one per token; choose another loss"
        )


def _student(config: Config) -> Iterator[str]:
    """What a student with a teacher was not compared with."""
    if config.model.load_in_4bit:
        yield (
            "load_in_4bit=True: a student in 4 bit was not compared with the reference beside a "
            "teacher; remove one of them"
        )
    if all(entry.ema_decay is None for entry in teacher_entries(config.distillation)):
        return
    if config.model.precision == "fp16":
        yield (
            "precision=fp16: an average of the student was not compared with the reference where "
            "steps may be skipped; use bf16 or fp32, or another teacher"
        )
    losses = [config.loss.mrl_layers, *(e.loss.get("mrl_layers") for e in config.data.datasets)]
    if layers := next(filter(None, losses), None):
        yield (
            f"mrl_layers={list(layers)}: an average of the student was not compared "
            "with the reference over several layers; remove mrl_layers, or choose another teacher"
        )


def _teacher(config: Config, place: int, entry: TeacherEntry) -> Iterator[str]:
    """What is wrong with one teacher as it is configured."""

    def key(name: str) -> str:
        own = config.distillation.teachers
        if own and getattr(own[place], name) is not None:
            return f"teachers[{place}].{name}"
        return f"teacher_{name}"

    if entry.ds_config is not None and not Path(entry.ds_config).is_file():
        yield f"{key('ds_config')}={entry.ds_config!r}: no such file; check the path"
    if entry.model_name is None:
        return
    reference = entry.model_name
    if isinstance(reference, str) and (problem := reference_problem(reference)):
        yield f"{key('model_name')}={reference!r}: {problem}"
    if isinstance(reference, ScratchModel) and reference.processor is None:
        yield (
            f"{key('model_name')}: a model that starts from random weights brings no processor; name "
            "a folder with one under processor"
        )
    if config.data.streaming and entry.mode != "live":
        yield (
            f"{key('mode')}={entry.mode}: embeds every item once, and streaming does not know them "
            "all; set it to live, or streaming: false"
        )


def _names(section: DistillationConfig) -> Iterator[str]:
    names = [str(entry.name) for entry in teacher_entries(section)]
    if repeated := {name for name in names if names.count(name) > 1}:
        yield f"teachers: {min(repeated)!r} stands there twice; give each a name of its own"
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):  # no path, and not "..", which is one
            yield f"teachers: the name {name!r} is that of a folder too; use letters, digits, - and _"


def _unused_by_teachers(section: DistillationConfig) -> Iterator[str]:
    """What is set for all teachers, of whom none reads it."""
    entries = teacher_entries(section)
    modes = {entry.mode for entry in entries if entry.model_name is not None}
    unread = () if modes else OF_MODELS
    if all(entry.scores for entry in entries):
        unread = (*unread, "teacher_ds_config")
    for key in unread:
        if (value := getattr(section, key)) != _default(key):
            yield f"{key}={value!r}: no teacher is a model that reads it; remove {key}"
    if section.teacher_cache is not None and not modes & {"cached", "first_epoch"}:
        yield (
            f"teacher_cache={section.teacher_cache!r}: no teacher is cached; set teacher_mode: "
            "cached or first_epoch, or remove teacher_cache"
        )


def _default(key: str) -> object:
    return DistillationConfig.model_fields[key].default
