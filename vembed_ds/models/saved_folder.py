"""Folders that hold more than a Hugging Face model, and say how it is pooled and what follows.

This project's exports (``vembed_config.json``), vembed-factory's checkpoints
(``vembed_checkpoint.py``), and sentence-transformers' folders with layers behind the pooling
(``dense_modules.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec
from vembed_ds.models.dense_modules import DenseModules, read_dense_settings
from vembed_ds.models.foreign import Tensors
from vembed_ds.models.lora import base_of
from vembed_ds.models.module_state import StatePart, find_state
from vembed_ds.models.projections import StoredProjection
from vembed_ds.models.vembed_checkpoint import KEYS, STREAMS, read_state, translate

SETTINGS_FILE = "vembed_config.json"


def read_settings(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """What a folder says of its model, as this project writes it; empty for a plain folder.

    Args:
        folder: Of a model.
        trust_remote_code: Whether code in vembed-factory's folders may run, which say less.

    Raises:
        ConfigError: It cannot be read, or belongs to another program.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return _without_file(folder) if folder.is_dir() else {}
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if "format_version" not in settings and settings.keys() >= KEYS:
        return translate(folder, settings, trust_remote_code=trust_remote_code)
    if settings.get("format_version") != 1:
        raise ConfigError(
            f"{path}: format_version={settings.get('format_version')}: this version reads 1 "
            "(another program's folder: remove the file to load it as a plain model)"
        )
    return settings


def saved_spec(
    folder: str, settings: Mapping[str, Any], *, trust_remote_code: bool = False
) -> ModelSpec:
    """The model that a folder holds.

    Args:
        folder: The folder, or a plain model's hub name.
        settings: From :func:`read_settings`.
        trust_remote_code: Whether code in it may run.
    """
    names = {"": folder}
    if settings.get("encoder_mode") == "composed":
        names = {s: str(Path(folder) / f"{s}_encoder") for s in settings["streams"]}
    names |= settings.get("towers", {})
    bases = {key: base_of(Path(name)) for key, name in names.items()}
    state: Mapping[str, StatePart] = {}
    if settings.get("state"):
        state = read_state(Path(folder)) or {}
    adapted = {key for key, base in bases.items() if base is not None and key not in state}
    return ModelSpec(
        sources={
            key: BackboneSource(name=bases[key] or name, state=state.get(key))
            for key, name in names.items()
        },
        adapters={key: Path(names[key]) for key in adapted},
        pooling=settings.get("pooling", {}),
        prefer_pooler=settings.get("prefer_pooler", False),
        projection_dim=settings.get("projection_dim"),
        projection_layers=settings.get("projection_layers"),
        projection_files={
            name: state[name] if name in state else _projection(Path(folder), name, described)
            for name, described in settings.get("projections", {}).items()
        },
        topk_tokens=settings.get("topk_tokens") or None,
        trust_remote_code=trust_remote_code,
    )


def processor_sources(folder: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Where tokenizer and image processor of each stream are.

    Args:
        folder: As in :func:`saved_spec`.
        settings: From :func:`read_settings`.
    """
    if settings.get("encoder_mode") != "composed":
        return dict.fromkeys(STREAMS, folder)
    own = {s: str(Path(folder) / f"{s}_encoder") for s in settings["streams"]}
    stated: Mapping[str, str] = settings.get("processors", {})
    return {**own, **stated}


def _without_file(folder: Path) -> dict[str, Any]:
    if find_state(folder, pickled=False) is not None:
        raise ConfigError(
            f"{folder}: its weights are those of vembed-factory's module, as accelerate saves them, "
            f"but there is no {SETTINGS_FILE}, which says how they are pooled; copy it, and "
            "config.json, from the checkpoint"
        )
    return read_dense_settings(folder)


def _projection(folder: Path, name: str, described: Mapping[str, Any]) -> Tensors:
    if "modules" in described:
        return DenseModules(tuple(folder / module for module in described["modules"]))
    return StoredProjection(folder / described.get("file", f"{name}.safetensors"))
