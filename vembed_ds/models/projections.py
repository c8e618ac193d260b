"""Stored projections: our safetensors files and vembed-factory's ``.pt`` files."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vembed_ds.errors import ConfigError, one_line, refused_global
from vembed_ds.models.encoder import TowersEncoder, TwoTowerEncoder

AnyEncoder: TypeAlias = TowersEncoder | TwoTowerEncoder


def load_projections(encoder: AnyEncoder, files: Mapping[str, Path]) -> None:
    """Fill an encoder's projections.

    Args:
        encoder: With a projection for every file.
        files: File of each projection: ``projection_head``, ``text_projection``,
            ``image_projection``.

    Raises:
        ConfigError: A file is missing, damaged, or of another shape.
    """
    for name, path in files.items():
        tensors = read_projection(path)
        try:
            _projection(encoder, name).load_state_dict(tensors)
        except RuntimeError as error:
            raise ConfigError(f"{path}: does not fit vembed_config.json: {error}") from error


def read_projection(path: Path) -> dict[str, Tensor]:
    """The tensors of one projection, by name; a ``.pt`` file may hold nothing else.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: missing, but vembed_config.json names it; convert again")
    tensors: Any
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        called = refused_global(error)
        finding = f"{called}, which could run code" if called else one_line(error)
        raise ConfigError(
            f"{path}: does not fit vembed_config.json: it is damaged, or holds more than tensors "
            f"({finding})"
        ) from error
    if not (isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values())):
        raise ConfigError(f"{path}: does not hold the tensors of a projection; convert again")
    return {str(name): tensor.float() for name, tensor in tensors.items()}


def _projection(encoder: AnyEncoder, name: str) -> nn.Module:
    if isinstance(encoder, TwoTowerEncoder):
        projection = encoder.projection
    else:
        stream = encoder.parts[0] if name == "projection_head" else name.split("_")[0]
        projection = encoder.tower(stream).projection
    assert projection is not None, "the files decide whether there is one"
    return projection
