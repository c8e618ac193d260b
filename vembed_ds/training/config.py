"""The configuration for a script of one's own, from the command line or from values in memory."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vembed_ds.config.loading import config_notices, load_config, parse_config
from vembed_ds.config.schema import ALIASES, SECTION_OF, Config, default_of
from vembed_ds.distributed import comm

logger = logging.getLogger(__name__)

# In a plain mapping these are no settings; the builders that use them read them themselves.
_BESIDE = ("processor",)


class Settings(dict[str, Any]):
    """A configuration that a script reads and changes by key, as vembed-factory's do.

    Every builder takes it, and checks it as a file is checked. Other spellings of a key mean the key.
    """

    def __getitem__(self, key: str) -> Any:
        """The value of a key, in either spelling."""
        return super().__getitem__(ALIASES.get(key, key))

    def __setitem__(self, key: str, value: Any) -> None:
        """Change a value; what is wrong with it, the next builder says."""
        super().__setitem__(ALIASES.get(key, key), value)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(ALIASES.get(key, key) if isinstance(key, str) else key)

    def get(self, key: str, default: Any = None) -> Any:
        """As :meth:`__getitem__`, or ``default`` when there is no such key."""
        return super().get(ALIASES.get(key, key), default)


def load_and_parse_config(
    arguments: Sequence[str] | None = None,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Settings:
    """Read ``--config``, ``--config_override`` and ``--gradient_checkpointing``.

    Args:
        arguments: Of the command; ``None``: those of this process, unless ``config`` is given.
            Others than these are left to the script.
        config: YAML file, in place of ``--config``.
        overrides: ``key=value``, in place of ``--config_override``.

    Raises:
        ConfigError: Listing every problem.
    """
    path, given = config, list(overrides)
    if config is None:
        parsed = _parse(arguments)
        path = parsed.config
        given = [*parsed.config_override, *given]
        if parsed.gradient_checkpointing:
            given.append("gradient_checkpointing=true")
    loaded = load_config(path, given)
    if comm.is_main():
        for notice in config_notices(path, given):
            logger.warning("%s", notice)
    return Settings(loaded.flat())


def as_config(config: Config | Mapping[str, Any]) -> Config:
    """The configuration itself, or a plain mapping checked like a file.

    Args:
        config: A mapping may leave out ``data_path``: whoever builds parts brings data too.

    Raises:
        ConfigError: Listing every problem.
    """
    if isinstance(config, Config):
        return config
    given = {
        key: value
        for key, value in config.items()
        # What is at its default counts as not given, where a rule asks for that.
        if key not in _BESIDE and not (key in SECTION_OF and value == default_of(key))
    }
    return parse_config({"data_path": ".", **given}, origin="config")


def get_distributed_config(config: Config | Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Whether activations are recomputed, gradients cached, and unused parameters looked for.

    Args:
        config: A configuration, or a plain mapping.

    Returns:
        ``(gradient_checkpointing, use_gradient_cache, False)``. The last is DDP's
        ``find_unused_parameters``, which nothing here needs: a parameter that a step does not use
        has gradient zero.
    """
    found = as_config(config)
    return found.model.gradient_checkpointing, found.training.use_gradient_cache, False


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--config_override", nargs="+", action="extend", default=[])
    parser.add_argument("--gradient_checkpointing", action="store_true")
    return parser.parse_known_args(arguments)[0]
