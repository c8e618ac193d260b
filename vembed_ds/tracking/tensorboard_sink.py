"""TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoardSink:
    """Scalars and the settings as event files.

    Args:
        folder: Where the event files go.
        config: Settings, shown as text.
        resume_step: Earlier events of later steps are hidden; 0 hides all.
    """

    def __init__(self, folder: Path, *, config: Mapping[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        purge = resume_step + 1 if resume_step else 0
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("config", f"```\n{text}\n```", global_step=resume_step)

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Add one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending and close the event file."""
        self._writer.close()
