"""The layers that sentence-transformers' folders may have behind the pooling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vembed_ds.errors import ConfigError, one_line
from vembed_ds.models.foreign import read_tensors

_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
_FILES = ("model.safetensors", "pytorch_model.bin")
# Bias and activation of the layers of a projection, as this project has them.
_LINEAR = (False, "Identity")
_HIDDEN = (True, "GELU")


@dataclass(frozen=True)
class DenseModules:
    """A projection of one or two Dense modules.

    Attributes:
        folders: Of the modules, in their order.
    """

    folders: tuple[Path, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.folders))

    def read(self) -> dict[str, Tensor]:
        """Its tensors, under the names of this project's projections, float32.

        Raises:
            ConfigError: A file is missing or damaged.
        """
        found = {}
        for number, folder in enumerate(self.folders):
            prefix = "" if len(self.folders) == 1 else f"{2 * number}."
            path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
            if path is None:
                raise ConfigError(f"{folder / _FILES[0]}: missing; copy the folder whole")
            for name, tensor in read_tensors(path).items():
                found[prefix + name.removeprefix("linear.")] = tensor.float()
        return found


def read_dense_settings(folder: Path) -> dict[str, Any]:
    """What a sentence-transformers folder with Dense modules says; empty: it has none.

    Args:
        folder: With a ``modules.json``, or a plain one.

    Raises:
        ConfigError: Its layers are none that this project has.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return {}
    entries = _json(path)
    kinds = [entry["type"].rpartition(".")[2] for entry in entries]
    dense = tuple(folder / e["path"] for e, k in zip(entries, kinds, strict=True) if k == "Dense")
    if not dense or any(kind not in _KINDS for kind in kinds):
        return {}  # a plain folder, or one that is refused when it is built
    configs = [_json(place / "config.json") for place in dense]
    _check(folder, configs)
    shape = [configs[-1]["out_features"], configs[0]["in_features"]]
    modules = [place.relative_to(folder).as_posix() for place in dense]
    head = {"layers": len(dense), "shape": shape, "modules": modules}
    prompts = _json(folder / "config_sentence_transformers.json").get("prompts") or {}
    return {
        "layout": "a folder of sentence-transformers with Dense modules",
        "encoder_mode": "auto",
        "projections": {"projection_head": head},
        "projection_dim": shape[0],
        "projection_layers": len(dense),
        **{f"{role}_instruction": prompts.get(role) or "" for role in ("query", "document")},
    }


def _check(folder: Path, configs: list[Mapping[str, Any]]) -> None:
    found = [
        (bool(config.get("bias", True)), config["activation_function"].rpartition(".")[2])
        for config in configs
    ]
    square = configs[0]["in_features"] == configs[0]["out_features"]
    known = found == [_LINEAR] or (found == [_HIDDEN, _LINEAR] and square)
    special = [
        key
        for config in configs
        for key in ("use_residual", "module_input_name", "module_output_name")
        if config.get(key) not in (None, False, "sentence_embedding")
    ]
    if not known or special:
        layers = ", ".join(
            f"{activation} behind a matrix with{'' if bias else 'out'} bias"
            for bias, activation in found
        )
        what = ", ".join([layers, *special])
        raise ConfigError(
            f"{folder}: its Dense modules ({what}) are no "
            "projection of this project, which is a matrix without bias, or a square one with bias, GELU, "
            "and one without; to train the backbone alone, give a copy without modules.json"
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path}: damaged: {one_line(error)}") from error
