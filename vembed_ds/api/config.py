"""The configuration of a run as a Python object, with the keys and the errors of the YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from vembed_ds.config.keywords import Settings
from vembed_ds.config.loading import Layer, dump_config, read_layers
from vembed_ds.config.schema import Config
from vembed_ds.config.yaml_text import read_yaml_mapping

KEYWORDS = "TrainConfig"


class TrainConfig:
    """All settings of a run, checked when it is made; frozen.

    The keys are those of the YAML file: flat, or as mappings of sections (``optimizer={"lr": 1e-4}``).
    Lists may be tuples, and paths ``pathlib.Path``. Data may be left out here and given to
    :class:`Trainer`.

    Args:
        settings: Keys of the README's tables; also vembed-factory's.

    Attributes:
        resolved: Every key with its value, by section: ``config.resolved.optimizer.lr``.
        notices: One line for each key that was accepted and does not do what it says.

    Raises:
        ConfigError: Listing every problem; an unknown key comes with the nearest known one.
    """

    resolved: Config
    notices: list[str]

    def __init__(self, **settings: Unpack[Settings]) -> None:
        self._read([Layer(plain(dict(settings)), KEYWORDS)])

    @classmethod
    def from_yaml(
        cls,
        path: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        **settings: Unpack[Settings],
    ) -> TrainConfig:
        """Read a YAML file.

        Args:
            path: The file.
            overrides: ``key=value``, as of ``--config_override``; they win over the file.
            settings: The same as keywords; they win over the file too.

        Raises:
            ConfigError: Listing every problem.
        """
        file = Path(path)
        layers = [
            Layer(read_yaml_mapping(file), str(file)),
            Layer(plain(dict(settings)), KEYWORDS),
        ]
        return cls.from_layers(layers, overrides)

    @classmethod
    def from_layers(cls, layers: Sequence[Layer], overrides: Sequence[str] = ()) -> TrainConfig:
        """Put settings from several places together; the arguments are :func:`read_layers`'s."""
        found = cls.__new__(cls)
        found._read(layers, overrides)
        return found

    def _read(self, layers: Sequence[Layer], overrides: Sequence[str] = ()) -> None:
        self._layers, self._overrides = tuple(layers), tuple(overrides)
        found = read_layers(self._layers, self._overrides, data_comes_later=True)
        self.resolved, self.notices = found.config, found.notices

    def complete(self, data: Mapping[str, Any], *, origin: str) -> tuple[Config, dict[str, str]]:
        """The configuration with its data, checked as a whole, and where its values came from.

        Args:
            data: ``data_path``, ``val_data_path``, or neither; they win.
            origin: Who gave them, for messages.

        Raises:
            ConfigError: Listing every problem; a run without training data is one.
        """
        found = read_layers([*self._layers, Layer(plain(data), origin)], self._overrides)
        return found.config, found.origins

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Every key with its value, defaults too, as YAML that :meth:`from_yaml` reads back as equal.

        Args:
            path: Also write it there.
        """
        text = dump_config(self.resolved)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __getitem__(self, key: str) -> Any:
        """The value of a key, in either spelling.

        Raises:
            KeyError: There is no such key.
        """
        return self.resolved[key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainConfig) and self.resolved == other.resolved

    def __hash__(self) -> int:
        return hash(self.to_yaml())

    def __repr__(self) -> str:
        given = [
            f"{key}={value!r}" for layer in self._layers for key, value in layer.values.items()
        ]
        return f"TrainConfig({', '.join([*given, *self._overrides])})"


def plain(value: Any) -> Any:
    """The value with every path in it as text, which YAML has."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value
