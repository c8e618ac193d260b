"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.durable import replace_text
from vembed_ds.errors import ConfigError, one_line

WANDB_FILE = "wandb_run_id.txt"


class WandbSink:
    """A Weights & Biases run; mode, project and key come from its environment variables.

    Args:
        folder: Where wandb keeps its files.
        run_name: Name of the run.
        config: Settings of the run.
        report_to: What the user wrote, for messages.
        resuming: Go on with the run that this folder has a note of.

    Raises:
        ConfigError: When wandb is not installed, or cannot start a run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run_name: str,
        config: Mapping[str, Any],
        report_to: str,
        resuming: bool,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"report_to={report_to}: wandb is not installed; run pip install "
                "'vembed-ds[wandb]' or take wandb out of report_to"
            ) from error
        project = os.environ.get("WANDB_PROJECT", "vembed-ds")
        note = folder / WANDB_FILE
        earlier: dict[str, Any] = {}
        if resuming and note.is_file():
            # "must" would fail where the server has not heard of the run, which was offline.
            earlier = {"id": note.read_text(encoding="utf-8").strip(), "resume": "allow"}
        try:
            self._run: Any = wandb.init(
                project=project, name=run_name, dir=str(folder), config=dict(config), **earlier
            )
        except Exception as error:  # also pydantic's, of a variable with a wrong value
            raise ConfigError(
                f"report_to={report_to}: wandb cannot start ({one_line(error)}); run wandb login, set "
                "WANDB_MODE=offline, or take wandb out of report_to"
            ) from error
        replace_text(note, f"{self._run.id}\n")

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Send the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is pending and end the run."""
        self._run.finish()
