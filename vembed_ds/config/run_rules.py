"""Rules of the run itself: waiting, evaluating, saving, and where all of it goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path

from vembed_ds.config.datasets import dataset_name
from vembed_ds.config.distillation import teacher_entries
from vembed_ds.config.distillation_rules import DISTILLATION_KEYS
from vembed_ds.config.schema import Config


def _loader_timeout(config: Config) -> Iterator[str]:
    seconds, minutes = config.data.loader_timeout_seconds, config.run.timeout_minutes
    if seconds is not None and seconds >= 60 * minutes:
        yield (
            f"loader_timeout_seconds={seconds:g}: must be below timeout_minutes={minutes:g} "
            f"({60 * minutes:g} s), or the other ranks give up first and nobody says why; lower it"
        )


def _chunks(config: Config) -> Iterator[str]:
    training = config.training
    tokens = training.gradient_cache_chunk_tokens
    if training.gradient_cache_chunk_size == "auto" and isinstance(tokens, int):
        yield (
            f"gradient_cache_chunk_tokens={tokens}: with gradient_cache_chunk_size=auto they follow from "
            "the memory; remove one of the two"
        )


def _evaluation(config: Config) -> Iterator[str]:
    if config.run.eval_steps and not _has_validation_data(config):
        yield (
            f"eval_steps={config.run.eval_steps}: there is nothing to evaluate on; "
            "set val_data_path, or eval_steps=0"
        )


def _recall(config: Config) -> Iterator[str]:
    values = config.run.eval_recall_k
    if repeated := {k for k in values if values.count(k) > 1}:
        yield f"eval_recall_k={list(values)}: {min(repeated)} stands there twice; keep one"


def _best_metric(config: Config) -> Iterator[str]:
    name = config.run.best_metric
    if name is None:
        return
    if not _has_validation_data(config):
        yield f"best_metric={name!r}: there is nothing to evaluate on; set val_data_path, or remove it"
        return
    known = _metric_names(config)
    if name.removeprefix("eval/") not in known:
        near = get_close_matches(name.removeprefix("eval/"), known, n=1, cutoff=0.0)[0]
        yield (
            f"best_metric={name!r}: the evaluation gives no such metric; the nearest is {near} (also "
            f"known: {', '.join(other for other in known if other != near)})"
        )


def _metric_names(config: Config) -> list[str]:
    """Of an evaluation, as metrics.jsonl has them behind ``eval/``; the higher, the better."""
    plain = [*(f"recall@{k}" for k in config.run.eval_recall_k), "mrr"]
    dims = config.loss.mrl_dims if config.loss.use_mrl else ()
    suffixes = ["", *(f"_d{dim}" for dim in dims)]
    entries = config.data.datasets
    prefixes = [f"{dataset_name(entry, place)}/" for place, entry in enumerate(entries)] or [""]
    return [f"{p}{name}{s}" for p in prefixes for s in suffixes for name in plain]


def _has_validation_data(config: Config) -> bool:
    entries = config.data.datasets
    return any([config.data.val_data_path, *(entry.val_data_path for entry in entries)])


def _save_epochs(config: Config) -> Iterator[str]:
    if config.run.save_epochs and config.data.streaming:
        yield (
            f"save_epochs={config.run.save_epochs}: streaming does not know when an epoch ends; set "
            "save_steps instead"
        )


def _node_local(config: Config) -> Iterator[str]:
    """What is stored once in ``output_dir`` and read by all ranks."""
    if not config.run.node_local_output:
        return
    guides = [config.loss.guide_model_name]
    guides += [entry.loss.get("guide_model_name") for entry in config.data.datasets]
    modes = {entry.mode for entry in teacher_entries(config.distillation) if entry.model_name}
    stored = {
        "guide_model_name": next((guide for guide in guides if guide is not None), None),
        "cache_frozen_encoder": _stores_features(config),
        "teacher_mode": next(iter(modes & {"cached", "first_epoch"}), None),
    }
    for key, value in stored.items():
        if value:
            yield (
                f"node_local_output=True: {key}={value!r} stores vectors that all ranks read; "
                f"give a shared output_dir, or change {key}"
            )


def _stores_features(config: Config) -> bool:
    """Whether features of a frozen tower may be stored in ``output_dir``."""
    model, data = config.model, config.data
    images = model.freeze_image_encoder and not (data.streaming or data.image_augmentation)
    stored = model.cache_frozen_encoder and model.frozen_features_dir is None
    return stored and (model.freeze_text_encoder or images)


def _features_dir(config: Config) -> Iterator[str]:
    model = config.model
    frozen = model.freeze_text_encoder or model.freeze_image_encoder
    if model.frozen_features_dir is not None and not (frozen and model.cache_frozen_encoder):
        yield (
            f"frozen_features_dir={model.frozen_features_dir!r}: nothing would be kept there; set "
            "freeze_text_encoder or freeze_image_encoder, and cache_frozen_encoder, or remove it"
        )


def _output(config: Config) -> Iterator[str]:
    path = Path(config.run.output_dir)
    if path.parts[:1] == ("~",):
        yield f"output_dir={str(path)!r}: only a shell replaces ~; write the whole path"
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir():
        yield f"output_dir={str(path)!r}: {existing} is a file; give a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"output_dir={str(path)!r}: cannot write in {existing}; give another folder"


RUN_RULES: tuple[tuple[tuple[str, ...], Callable[[Config], Iterator[str]]], ...] = (
    (("loader_timeout_seconds", "timeout_minutes"), _loader_timeout),
    (("gradient_cache_chunk_size", "gradient_cache_chunk_tokens"), _chunks),
    (("eval_steps", "val_data_path", "datasets"), _evaluation),
    (("eval_recall_k",), _recall),
    (
        ("best_metric", "eval_recall_k", "val_data_path", "datasets", "use_mrl", "mrl_dims"),
        _best_metric,
    ),
    (("save_epochs", "streaming"), _save_epochs),
    (
        (
            *("node_local_output", "guide_model_name", "datasets", *DISTILLATION_KEYS),
            *("freeze_text_encoder", "cache_frozen_encoder", "frozen_features_dir"),
            *("freeze_image_encoder", "streaming", "image_augmentation"),
        ),
        _node_local,
    ),
    (
        (
            *("frozen_features_dir", "cache_frozen_encoder"),
            *("freeze_text_encoder", "freeze_image_encoder"),
        ),
        _features_dir,
    ),
    (("output_dir",), _output),
)
"""The keys each rule reads, and the rule."""
