"""The weights in a model's safetensors files, one tensor at a time, under the model's own names.

transformers renames and converts what older files hold (a prefix, fused matrices) while it loads.
Its tables and conversions are used here; its loop is not, because it keeps what it has read.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from vembed_ds.errors import ConfigError, one_line
from vembed_ds.models.backbones import BackboneSource, repository_file


class StoredWeights:
    """What some files hold for a model.

    Args:
        model: A Hugging Face model; on any device, its values do not matter.
        files: Its safetensors files.
        origin: The model's name, for messages.

    Attributes:
        names: Of the model's parameters and buffers that the files hold.

    Raises:
        ConfigError: A file is damaged.
    """

    def __init__(self, model: Any, files: Sequence[Path], *, origin: str) -> None:
        self._model, self._origin = model, origin
        self._expected: dict[str, Tensor] = model.state_dict()
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._groups: dict[str, Any] = {}
        self.names: set[str] = set()
        places = {key: file for file in files for key in _keys(file, origin)}
        for key in sorted(places, key=dot_natural_key):
            self._assign(key, places[key])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name in the model, in the model's number format; only once.

        At one time there is what one tensor is made of, and the tensor.

        Raises:
            ConfigError: A tensor cannot be read or converted, or has another shape.
        """
        while self._groups:
            name = next(iter(self._groups))
            for found, tensor in self._convert(name, self._groups.pop(name)).items():
                yield found, self._fitting(found, tensor)

    def missing(self) -> list[str]:
        """What the model has and the files lack, but for what is no weight of its own.

        Not counted are the second name of a tied weight, and what transformers computes or does
        without.
        """
        held = {id(value) for name, value in self._kept() if name in self.names}
        lacking = [name for name, value in self._kept() if id(value) not in held]
        ignored = "|".join(self._model._keys_to_ignore_on_load_missing or ()) or r"(?!)"
        return sorted(name for name in lacking if not re.search(ignored, name))

    def _kept(self) -> list[tuple[str, Tensor]]:
        return list(self._model.state_dict(keep_vars=True).items())

    def _assign(self, key: str, file: Path) -> None:
        """Add a stored tensor to the group of those that one or more of the model's are made of."""
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(
            key, self._renamings, self._converters, prefix, self._expected
        )
        if name not in self._expected and key in self._expected:
            name, pattern = key, None
        if name not in self._expected:
            return
        if pattern is None:
            made, targets = WeightRenaming(key, name), [name]
        else:
            rule = next(c for c in self._converters if pattern in c.source_patterns)
            made = copy.deepcopy(rule)
            first, *_ = rule.target_patterns
            targets = [name.replace(first, target) for target in rule.target_patterns]
        group = self._groups.setdefault(name, made)
        group.add_tensor(name, key, pattern or key, functools.partial(_read, file, key))
        self.names |= set(targets)

    def _convert(self, name: str, group: Any) -> dict[str, Tensor]:
        try:
            made = group.convert(name, model=self._model, config=self._model.config)
        except Exception as error:  # a damaged file, or whatever a conversion raises
            raise ConfigError(
                f"model {self._origin}: {name} cannot be read: {one_line(error)}"
            ) from error
        return {key: v[0] if isinstance(v, list) else v for key, v in made.items()}

    def _fitting(self, name: str, tensor: Tensor) -> Tensor:
        wanted = self._expected[name]
        if tensor.shape != wanted.shape:
            raise ConfigError(
                f"model {self._origin}: its files hold {name} of shape {list(tensor.shape)}, and "
                f"its config.json says {list(wanted.shape)}; give the files that belong to it"
            )
        return tensor.to(wanted.dtype)


def weight_files(source: BackboneSource) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        ConfigError: It has none, or lacks one that its index names.
    """
    if source.state is not None:
        raise ConfigError(
            f"model {source.describe()}: its weights are those of vembed-factory's module, as accelerate "
            "saves them, which are not read tensor by tensor; give a checkpoint with Hugging Face files"
        )
    if (whole := repository_file(source, SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    index = repository_file(source, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise _without_files(source)
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = {name: repository_file(source, name) for name in names}
    if lacking := [name for name, file in found.items() if file is None]:
        raise ConfigError(
            f"model {source.describe()}: {index.name} names {lacking[0]}, which is missing; "
            "fetch it again"
        )
    return [file for file in found.values() if file is not None]


def _without_files(source: BackboneSource) -> ConfigError:
    if repository_file(source, WEIGHTS_NAME) is None:
        return ConfigError(
            f"model {source.describe()}: has no {SAFE_WEIGHTS_NAME}; give a folder with weights"
        )
    return ConfigError(
        f"model {source.describe()}: has {WEIGHTS_NAME} only, which cannot be read tensor by "
        f"tensor; write it as {SAFE_WEIGHTS_NAME} (load it in transformers, then save_pretrained)"
    )


def _keys(file: Path, origin: str) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"model {origin}: {file.name} is damaged: {one_line(error)}") from error


def _read(file: Path, key: str) -> Tensor:
    # Opened for every tensor and copied: the pages of a file that stays mapped count as memory.
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key).clone()
    return tensor
