"""SwanLab."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.durable import replace_text
from vembed_ds.errors import ConfigError, one_line

SWANLAB_FILE = "swanlab_run_id.txt"


class SwanlabSink:
    """A SwanLab run; mode, project and key come from its environment variables.

    Args:
        folder: Where swanlab keeps its files, in ``swanlab``.
        run_name: Name of the run.
        config: Settings of the run.
        report_to: What the user wrote, for messages.
        resuming: Go on with the run that this folder has a note of.

    Raises:
        ConfigError: When swanlab is not installed, or cannot start a run.
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
            import swanlab
        except ImportError as error:
            raise ConfigError(
                f"report_to={report_to}: swanlab is not installed; run pip install "
                "'vembed-ds[swanlab]' or take swanlab out of report_to"
            ) from error
        note = folder / SWANLAB_FILE
        earlier: dict[str, Any] = {}
        if resuming and note.is_file():
            earlier = {"id": note.read_text(encoding="utf-8").strip(), "resume": "allow"}
        try:
            self._run: Any = swanlab.init(
                project=os.environ.get("SWANLAB_PROJECT", "vembed-ds"),
                name=run_name,
                log_dir=str(folder / "swanlab"),
                config=dict(config),
                **earlier,
            )
        except Exception as error:  # of any of the libraries that it is made of
            raise ConfigError(
                f"report_to={report_to}: swanlab cannot start ({one_line(error)}); run swanlab login, "
                "set SWANLAB_MODE=offline, or take swanlab out of report_to"
            ) from error
        replace_text(note, f"{self._run.id}\n")

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Send the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is pending and end the run."""
        self._run.finish()
