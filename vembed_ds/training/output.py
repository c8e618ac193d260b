"""The run's folder: what is written into it, and what happens to an earlier run in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.config.loading import dump_config
from vembed_ds.config.schema import Config

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
DS_CONFIG_FILE = "ds_config.json"
_PREVIOUS = "previous-"
_WRITTEN = (
    CONFIG_FILE,
    DS_CONFIG_FILE,
    "metrics.jsonl",
    "tensorboard",
    "wandb",
    "checkpoint-step-*",
    "latest",
    "frozen_text_features",
)


def prepare_output(config: Config, ds_config: Mapping[str, Any], *, resuming: bool) -> Path:
    """Make the folder ready and write the resolved configuration. Rank 0 only.

    A fresh run in the folder of an earlier one moves what that wrote to ``previous-<n>/``;
    nothing is overwritten.

    Returns:
        The folder.
    """
    folder = Path(config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not resuming:
        _set_aside(folder)
    (folder / CONFIG_FILE).write_text(dump_config(config))
    (folder / DS_CONFIG_FILE).write_text(json.dumps(ds_config, indent=2))
    return folder


def _set_aside(folder: Path) -> None:
    if not (folder / CONFIG_FILE).exists():
        return
    # Only what a run writes: data, or the model to train, may lie in the folder too.
    entries = [entry for pattern in _WRITTEN for entry in folder.glob(pattern)]
    number = 1
    while (folder / f"{_PREVIOUS}{number}").exists():
        number += 1
    target = folder / f"{_PREVIOUS}{number}"
    target.mkdir()
    for entry in entries:
        entry.rename(target / entry.name)
    logger.warning("%s held an earlier run; it was moved to %s", folder, target)
