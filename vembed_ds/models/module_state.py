"""Weights of vembed-factory's whole module, as accelerate's ``save_state`` leaves them.

``model.safetensors`` (or its shards, or ``pytorch_model.bin``) in the folder of a checkpoint, under
the names of the module and not of a Hugging Face model:

===================================  ===========================================
``backend.backbone.``                the backbone
``backend.backbone.base_model.``     the same with peft's adapters in it
``backend.projection_head.``         its projection
``backend.text_encoder.model.``,     a composed encoder
``backend.text_projection.``, ...
===================================  ===========================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vembed_ds.errors import ConfigError, one_line
from vembed_ds.models.foreign import read_tensors
from vembed_ds.models.lora import ADAPTER, ADAPTER_CONFIG, merged_weight, scaling_of

PREFIX = "backend."
_NAMES = ("model.safetensors", "pytorch_model.bin")
_ADAPTED = "base_model.model."
_STREAMS = ("text", "image")
_HEADS = ("projection_head", "text_projection", "image_projection")


@dataclass(frozen=True)
class StatePart:
    """The tensors of one part of the module.

    Attributes:
        files: File of every tensor of the module, by its name there.
        prefix: What the names of the part begin with.
        adapter_config: Where the part has adapters in it.
    """

    files: Mapping[str, Path]
    prefix: str
    adapter_config: Path | None = None

    def __str__(self) -> str:
        return f"{min(self.files.values())}: {self.prefix}*"

    def read(self) -> dict[str, Tensor]:
        """By the part's own names, float32, adapters merged.

        Raises:
            ConfigError: A file is damaged, or an adapter is not whole.
        """
        found = {}
        for path in sorted({file for name, file in self.files.items() if self._owns(name)}):
            for name, tensor in read_tensors(path).items():
                if self._owns(name):
                    found[name.removeprefix(self.prefix)] = tensor.float()
        return found if self.adapter_config is None else _merged(found, self.adapter_config)

    def _owns(self, name: str) -> bool:
        return name.startswith(self.prefix)


def find_state(folder: Path, *, pickled: bool) -> dict[str, Path] | None:
    """File of every tensor of a whole module's state; ``None``: the folder's weights are no such.

    Args:
        folder: Of a model or a checkpoint.
        pickled: Look into ``pytorch_model.bin`` too, which has to be read whole.

    Raises:
        ConfigError: A file is damaged or missing, or of a kind that is not read.
    """
    for path in folder.glob("pytorch_model_fsdp_*"):
        raise ConfigError(
            f"{path}: FSDP's own files, which are not read; first merge them: "
            f"accelerate merge-weights {path} {folder}"
        )
    for name in _NAMES if pickled else _NAMES[:1]:
        files = _files(folder, name)
        if any(key.startswith(PREFIX) for key in files):
            return files
    return None


def state_parts(folder: Path, files: Mapping[str, Path]) -> dict[str, StatePart]:
    """The parts of a module's state: ``""`` or ``text`` and ``image``, and the projections.

    Args:
        folder: Where an adapter's configuration is, if there are adapters.
        files: From :func:`find_state`.

    Raises:
        ConfigError: There is something else in it, or it has no backbone; names it.
    """
    prefixes = {"": f"{PREFIX}backbone."}
    prefixes |= {stream: f"{PREFIX}{stream}_encoder.model." for stream in _STREAMS}
    prefixes |= {head: f"{PREFIX}{head}." for head in _HEADS}
    unknown = [name for name in files if not name.startswith(tuple(prefixes.values()))]
    if unknown:
        raise ConfigError(
            f"{folder}: the weights of vembed-factory's module hold {len(unknown)} tensors that are "
            f"no part of a model known here (first: {min(unknown)})"
        )
    held = {
        key: prefix
        for key, prefix in prefixes.items()
        if any(name.startswith(prefix) for name in files)
    }
    if "" not in held and not held.keys() >= set(_STREAMS):
        raise ConfigError(f"{folder}: the weights of vembed-factory's module have no backbone")
    return {key: _part(folder, files, prefix) for key, prefix in held.items()}


def _part(folder: Path, files: Mapping[str, Path], prefix: str) -> StatePart:
    if not any(name.startswith(f"{prefix}{_ADAPTED}") for name in files):
        return StatePart(files, prefix)
    config = folder / ADAPTER_CONFIG
    if not config.is_file():
        raise ConfigError(
            f"{config}: missing, but {prefix}* has adapters in it; copy the file from the checkpoint"
        )
    return StatePart(files, f"{prefix}{_ADAPTED}", config)


def _files(folder: Path, name: str) -> dict[str, Path]:
    whole, index = folder / name, folder / f"{name}.index.json"
    if whole.is_file():
        return dict.fromkeys(_keys(whole), whole)
    if not index.is_file():
        return {}
    try:
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{index}: damaged: {one_line(error)}") from error
    files = {key: folder / file for key, file in places.items()}
    for file in files.values():
        if not file.is_file():
            raise ConfigError(
                f"{file}: missing, but {index.name} names it; copy it from the checkpoint"
            )
    return files


def _keys(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(read_tensors(path))
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged: {one_line(error)}") from error


def _merged(tensors: Mapping[str, Tensor], config_file: Path) -> dict[str, Tensor]:
    """A backbone's own names, with peft's adapters merged and its trained modules in place."""
    config = {"use_rslora": False, "fan_in_fan_out": False}
    config |= json.loads(config_file.read_text(encoding="utf-8"))
    if several := [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]:
        raise ConfigError(
            f"{config_file}: {', '.join(several)}: only adapters of one rank are read"
        )
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".original_module." not in name and ".lora_" not in name:
            own = name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(".base_layer.", ".")
            plain[own] = tensor
    for name in tensors:
        layer, found, _ = name.rpartition(f".lora_A.{ADAPTER}.weight")
        if not found:
            continue
        b = tensors.get(f"{layer}.lora_B.{ADAPTER}.weight")
        magnitude = tensors.get(f"{layer}.lora_magnitude_vector.{ADAPTER}.weight")
        if b is None or f"{layer}.weight" not in plain:
            raise ConfigError(f"{config_file.parent}: {layer}: its adapter is not whole")
        plain[f"{layer}.weight"] = merged_weight(
            plain[f"{layer}.weight"],
            tensors[name],
            b,
            magnitude,
            scaling=scaling_of(config),
            transposed=bool(config["fan_in_fan_out"]),
        )
    return plain
