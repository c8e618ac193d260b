"""Files of tensors that other programs wrote: read without running any code in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vembed_ds.errors import ConfigError, one_line


class Tensors(Protocol):
    """Tensors of a part of the model, wherever they are stored."""

    def read(self) -> dict[str, Tensor]:
        """By the part's own names, float32.

        Raises:
            ConfigError: They are missing or damaged.
        """


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of one that ``torch.save`` wrote, as they are.

    Raises:
        ConfigError: It is damaged, or holds anything else; names what would have been run.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: damaged: {one_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path}: damaged, or holds more than tensors ({_unsafe(path) or one_line(error)}), "
            "which could run code; write its tensors alone, best as safetensors"
        ) from error
    if not (isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values())):
        raise ConfigError(f"{path}: does not hold tensors by name")
    return {str(name): tensor for name, tensor in tensors.items()}


def _unsafe(path: Path) -> str:
    """The functions that unpickling would look up."""
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001  # of a damaged file, anything
        return ""
