"""The configuration for a script of one's own, from the command line or from values in memory."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vembed_ds.config.loading import config_notices, load_config, parse_config
from vembed_ds.config.schema import Config
from vembed_ds.distributed import comm

logger = logging.getLogger(__name__)

# In a plain mapping these are no settings; the builders that use them read them themselves.
_BESIDE = ("processor", "teacher_model_name")


def load_and_parse_config(
    arguments: Sequence[str] | None = None,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Read ``--config``, ``--config_override`` and ``--gradient_checkpointing``.

    The result answers ``config["batch_size"]`` and ``config.get("batch_size")``; it cannot be
    changed, but ``config.flat()`` is a dictionary that can, and that every builder takes too.

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
    return loaded


def as_config(config: Config | Mapping[str, Any]) -> Config:
    """The configuration itself, or a plain mapping checked like a file.

    Args:
        config: A mapping may leave out ``data_path``: whoever builds parts brings data too.

    Raises:
        ConfigError: Listing every problem.
    """
    if isinstance(config, Config):
        return config
    values = {key: value for key, value in config.items() if key not in _BESIDE}
    return parse_config({"data_path": ".", **values}, origin="config")


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
