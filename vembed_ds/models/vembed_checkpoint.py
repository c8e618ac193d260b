"""Checkpoints of vembed-factory, in this project's words.

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

With adapters, peft's files take the place of ``config.json`` and ``model.safetensors``. Where the
weights are those of accelerate's state alone, see ``module_state.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource, kind_of, load_skeleton
from vembed_ds.models.foreign import Tensors
from vembed_ds.models.lora import ADAPTER_WEIGHTS, base_of
from vembed_ds.models.module_state import StatePart, find_state, state_parts
from vembed_ds.models.projections import StoredProjection

STREAMS = ("text", "image")
KEYS = {"pooling_method", "encoder_mode"}  # what its vembed_config.json always says
# Backends of vembed-factory that always pool at the last token.
_LAST_TOKEN_MODES = ("qwen3_embedding", "qwen3_vl", "vlm_generic")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def translate(folder: Path, raw: Mapping[str, Any], *, trust_remote_code: bool) -> dict[str, Any]:
    """What its ``vembed_config.json`` says, as this project writes it.

    Args:
        folder: Of the checkpoint.
        raw: Content of the file.
        trust_remote_code: Whether code of the model may run.

    Raises:
        ConfigError: The checkpoint is incomplete.
    """
    kept = {key: raw[key] for key in ("retrieval_mode", "loss_type") if key in raw}
    layout = "a checkpoint of vembed-factory"
    if all((folder / f"{stream}_encoder").is_dir() for stream in STREAMS):
        processors = {stream: _processor_of_tower(folder, raw, stream) for stream in STREAMS}
        heads: dict[str, Tensors] = {
            name: StoredProjection(folder / f"{name}.pt") for name in _heads(STREAMS)
        }
        shape = {"processors": processors, **_composed(raw, heads)}
    elif state := read_state(folder):
        layout = "vembed-factory's module in accelerate's state"
        shape = _from_state(folder, raw, state, trust_remote_code=trust_remote_code)
    else:
        layout += " with adapters" if base_of(folder) else ""
        file = folder / "projection_head.pt"
        heads = {"projection_head": StoredProjection(file)} if file.is_file() else {}
        shape = _single(folder, raw, heads, trust_remote_code=trust_remote_code)
    return {**kept, "layout": layout, "topk_tokens": raw.get("topk_tokens") or None, **shape}


def read_state(folder: Path) -> dict[str, StatePart] | None:
    """The parts of accelerate's state, where a checkpoint has no Hugging Face weights beside it."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        return None  # what accelerate left beside an adapter is more, but not needed
    files = find_state(folder, pickled=True)
    return None if files is None else state_parts(folder, files)


def _from_state(
    folder: Path, raw: Mapping[str, Any], state: Mapping[str, StatePart], *, trust_remote_code: bool
) -> dict[str, Any]:
    if "" not in state:
        names = {stream: raw.get(f"{stream}_model_name") for stream in STREAMS}
        if lacking := [stream for stream, name in names.items() if not name]:
            raise ConfigError(
                f"{folder}: vembed_config.json names no {lacking[0]}_model_name, whose config.json "
                "belongs to these weights; add it"
            )
        heads = {name: state[name] for name in _heads(STREAMS) if name in state}
        return {"state": True, "towers": names, "processors": names, **_composed(raw, heads)}
    if not (folder / "config.json").is_file() and base_of(folder) is None:
        raise ConfigError(
            f"{folder / 'config.json'}: missing, and accelerate's state does not hold it; copy that "
            "of the model that was trained"
        )
    heads = {name: state[name] for name in ("projection_head",) if name in state}
    return {"state": True, **_single(folder, raw, heads, trust_remote_code=trust_remote_code)}


def _heads(streams: tuple[str, ...]) -> list[str]:
    return [f"{stream}_projection" for stream in streams]


def _composed(raw: Mapping[str, Any], heads: Mapping[str, Tensors]) -> dict[str, Any]:
    return {
        "encoder_mode": "composed",
        "streams": list(STREAMS),
        "pooling": {"text": raw["pooling_method"] or "mean", "image": "cls"},
        "prefer_pooler": True,
        **_projections(heads),
    }


def _single(
    folder: Path, raw: Mapping[str, Any], heads: Mapping[str, Tensors], *, trust_remote_code: bool
) -> dict[str, Any]:
    source = BackboneSource(name=base_of(folder) or str(folder))
    skeleton: Any = load_skeleton(source, trust_remote_code=trust_remote_code)
    last_token = raw["encoder_mode"] in _LAST_TOKEN_MODES
    pooling = "last_token" if last_token else raw["pooling_method"] or "cls"
    width, dim = _width(skeleton.config), raw.get("projection_dim")
    if dim not in (None, width) and not last_token and not heads:
        raise ConfigError(
            f"{folder / 'projection_head.pt'}: missing, but vembed_config.json says "
            f"projection_dim={dim}; the checkpoint is incomplete"
        )
    return {
        "encoder_mode": "auto",
        "pooling": {} if kind_of(skeleton) == "two_tower" else {"": pooling},
        "prefer_pooler": not last_token,
        **_projections(heads),
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


def _projections(heads: Mapping[str, Tensors]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for name, head in heads.items():
        matrices = [tensor for tensor in head.read().values() if tensor.dim() == 2]
        if not matrices:
            raise ConfigError(f"{name}: holds no matrix; the checkpoint is damaged")
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
            f"{own}: has no {what}, and vembed_config.json names no {stream}_model_name to take one "
            f"from; put the {what} of the original model into the folder"
        )
    return str(name)
