"""Stored projections: our safetensors files and vembed-factory's ``.pt`` files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from vembed_ds.errors import ConfigError
from vembed_ds.models.encoder import TowersEncoder, TwoTowerEncoder
from vembed_ds.models.foreign import Tensors, read_tensors

AnyEncoder: TypeAlias = TowersEncoder | TwoTowerEncoder


@dataclass(frozen=True)
class StoredProjection:
    """A projection in a file of its own.

    Attributes:
        path: ``.safetensors`` or ``.pt``.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> dict[str, Tensor]:
        """Its tensors by name, float32.

        Raises:
            ConfigError: The file is missing or damaged.
        """
        if not self.path.is_file():
            raise ConfigError(
                f"{self.path}: missing, but vembed_config.json names it; convert again"
            )
        return {name: tensor.float() for name, tensor in read_tensors(self.path).items()}


def load_projections(encoder: AnyEncoder, stored: Mapping[str, Tensors]) -> None:
    """Fill an encoder's projections.

    Args:
        encoder: With a projection for everything that is stored.
        stored: Of each projection: ``projection_head``, ``text_projection``,
            ``image_projection``.

    Raises:
        ConfigError: A file is missing, damaged, or of another shape.
    """
    for name, projection in stored.items():
        tensors = projection.read()
        try:
            _projection(encoder, name).load_state_dict(tensors)
        except RuntimeError as error:
            raise ConfigError(f"{projection}: does not fit vembed_config.json: {error}") from error


def _projection(encoder: AnyEncoder, name: str) -> nn.Module:
    if isinstance(encoder, TwoTowerEncoder):
        projection = encoder.projection
    else:
        stream = encoder.parts[0] if name == "projection_head" else name.split("_")[0]
        projection = encoder.tower(stream).projection
    assert projection is not None, "the files decide whether there is one"
    return projection
