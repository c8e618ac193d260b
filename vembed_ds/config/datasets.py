"""What a data set has of its own where several are listed: its name and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.config.schema import ALIASES, DatasetEntry, LossConfig


def dataset_name(entry: DatasetEntry, place: int) -> str:
    """The name of one of several data sets: given, or its file's."""
    if entry.name is not None:
        return entry.name
    path = entry.data_path if isinstance(entry.data_path, str) else entry.data_path[0]
    return Path(path).stem or str(place)


def merged_loss(shared: LossConfig, own: Mapping[str, Any]) -> LossConfig:
    """A data set's loss settings over those of all.

    Raises:
        ValidationError: A key is unknown, or a value is wrong.
    """
    stated = shared.model_dump(include=shared.model_fields_set)
    named = {ALIASES.get(key, key): value for key, value in own.items()}
    return LossConfig.model_validate(stated | named)
