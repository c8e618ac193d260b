"""Folders with a ``vembed_config.json``: this project's exports and vembed-factory's checkpoints.

vembed-factory's layout, which has no ``format_version``:

=====================  =====================================  ==============================
                       one backbone                           composed encoder
=====================  =====================================  ==============================
root                   config.json, model.safetensors,        vembed_config.json; no processor
                       tokenizer, image processor,            of its towers
                       vembed_config.json
text_encoder/,         -                                      config.json, model.safetensors
image_encoder/
projection, if any     projection_head.pt                     text_projection.pt,
                                                              image_projection.pt
=====================  =====================================  ==============================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource, kind_of, load_skeleton
from vembed_ds.models.builder import ModelSpec
from vembed_ds.models.lora import base_of
from vembed_ds.models.projections import read_projection

SETTINGS_FILE = "vembed_config.json"
STREAMS = ("text", "image")
_UPSTREAM_KEYS = {"pooling_method", "encoder_mode"}
# Backends of vembed-factory that always pool at the last token.
_LAST_TOKEN_MODES = ("qwen3_embedding", "qwen3_vl", "vlm_generic")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def read_settings(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """What ``vembed_config.json`` says, as this project writes it; empty for a plain folder.

    Args:
        folder: Of a model.
        trust_remote_code: Whether code in vembed-factory's folders may run, which say less.

    Raises:
        ConfigError: It cannot be read, or belongs to another program.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if "format_version" not in settings and settings.keys() >= _UPSTREAM_KEYS:
        return _translate(folder, settings, trust_remote_code=trust_remote_code)
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
    bases = {key: base_of(Path(name)) for key, name in names.items()}
    projections: Mapping[str, Any] = settings.get("projections", {})
    return ModelSpec(
        sources={key: BackboneSource(name=bases[key] or name) for key, name in names.items()},
        adapters={key: Path(names[key]) for key, base in bases.items() if base is not None},
        pooling=settings.get("pooling", {}),
        prefer_pooler=settings.get("prefer_pooler", False),
        projection_dim=settings.get("projection_dim"),
        projection_layers=settings.get("projection_layers"),
        projection_files={
            name: Path(folder) / described.get("file", f"{name}.safetensors")
            for name, described in projections.items()
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


def _translate(folder: Path, raw: Mapping[str, Any], *, trust_remote_code: bool) -> dict[str, Any]:
    """vembed-factory's settings in our words."""
    composed = all((folder / f"{stream}_encoder").is_dir() for stream in STREAMS)
    kept = {key: raw[key] for key in ("retrieval_mode", "loss_type") if key in raw}
    if composed:
        shape = _composed(folder, raw)
    else:
        shape = _single(folder, raw, trust_remote_code=trust_remote_code)
    return {**kept, "topk_tokens": raw.get("topk_tokens") or None, **shape}


def _composed(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    names = [f"{stream}_projection" for stream in STREAMS]
    return {
        "encoder_mode": "composed",
        "streams": list(STREAMS),
        "pooling": {"text": raw["pooling_method"] or "mean", "image": "cls"},
        "prefer_pooler": True,
        "processors": {stream: _processor_of_tower(folder, raw, stream) for stream in STREAMS},
        **_projections(folder, names),
    }


def _single(folder: Path, raw: Mapping[str, Any], *, trust_remote_code: bool) -> dict[str, Any]:
    source = BackboneSource(name=str(folder))
    skeleton: Any = load_skeleton(source, trust_remote_code=trust_remote_code)
    last_token = raw["encoder_mode"] in _LAST_TOKEN_MODES
    pooling = "last_token" if last_token else raw["pooling_method"] or "cls"
    width, dim = _width(skeleton.config), raw.get("projection_dim")
    has_head = (folder / "projection_head.pt").is_file()
    if dim not in (None, width) and not last_token and not has_head:
        raise ConfigError(
            f"{folder / 'projection_head.pt'}: missing, but {SETTINGS_FILE} says "
            f"projection_dim={dim}; the checkpoint is incomplete"
        )
    return {
        "encoder_mode": "auto",
        "pooling": {} if kind_of(skeleton) == "two_tower" else {"": pooling},
        "prefer_pooler": not last_token,
        **_projections(folder, ["projection_head"] if has_head else []),
    }


def _width(config: Any) -> int | None:
    """Width from which vembed-factory decided whether there is a projection."""
    text = getattr(config, "text_config", None)
    for holder, name in (
        (config, "hidden_size"),
        (config, "projection_dim"),
        (text, "hidden_size"),
    ):
        if width := getattr(holder, name, None):
            return int(width)
    return None


def _projections(folder: Path, names: list[str]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        matrices = [t for t in read_projection(folder / f"{name}.pt").values() if t.dim() == 2]
        if not matrices:
            raise ConfigError(f"{folder / name}.pt: holds no matrix; the checkpoint is damaged")
        shape = [matrices[-1].shape[0], matrices[0].shape[1]]
        found[name] = {"layers": len(matrices), "shape": shape, "file": f"{name}.pt"}
    first: Mapping[str, Any] = next(iter(found.values()), {"layers": None, "shape": [None]})
    return {
        "projections": found,
        "projection_dim": first["shape"][0],
        "projection_layers": first["layers"],
    }


def _processor_of_tower(folder: Path, raw: Mapping[str, Any], stream: str) -> str:
    """The tower's own folder, or the model that it came from: vembed-factory wrote no processor."""
    own = folder / f"{stream}_encoder"
    if any((own / name).is_file() for name in (_TOKENIZER_FILES, _IMAGE_FILES)[stream == "image"]):
        return str(own)
    name = raw.get(f"{stream}_model_name")
    if not name:
        what = "tokenizer" if stream == "text" else "image processor"
        raise ConfigError(
            f"{own}: has no {what}, and {SETTINGS_FILE} names no {stream}_model_name to take one "
            f"from; put the {what} of the original model into the folder"
        )
    return str(name)
