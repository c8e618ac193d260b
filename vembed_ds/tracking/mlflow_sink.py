"""MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.durable import replace_text
from vembed_ds.errors import ConfigError, one_line

MLFLOW_FILE = "mlflow_run_id.txt"
DATABASE = "mlflow.db"
MOST_AT_ONCE = 100  # settings in one request, by MLflow's own rule


class MlflowSink:
    """An MLflow run; without ``MLFLOW_TRACKING_URI`` it goes to a database in the run's folder.

    Args:
        folder: Of the run.
        run_name: Name of the run.
        config: Settings of the run, kept as parameters.
        report_to: What the user wrote, for messages.
        resuming: Go on with the run that this folder has a note of.

    Raises:
        ConfigError: When mlflow is not installed, or cannot start a run.
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
            import mlflow
        except ImportError as error:
            raise ConfigError(
                f"report_to={report_to}: mlflow is not installed; run pip install 'vembed-ds[mlflow]' "
                "or take mlflow out of report_to"
            ) from error
        self._metric: Any = mlflow.entities.Metric
        self._param: Any = mlflow.entities.Param
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute() / DATABASE}"
        note = folder / MLFLOW_FILE
        try:
            self._client: Any = mlflow.MlflowClient(tracking_uri=place)
            if resuming and note.is_file():
                self._run_id = note.read_text(encoding="utf-8").strip()
                self._client.update_run(self._run_id, status="RUNNING")
            else:
                self._run_id = self._begin(run_name, config)
        except Exception as error:  # of the store, whatever it is
            shown = place.rpartition("@")[2]  # before it may stand a password
            raise ConfigError(
                f"report_to={report_to}: mlflow cannot start at {shown} ({one_line(error)}); correct "
                "MLFLOW_TRACKING_URI, unset it to write into output_dir, or take mlflow out of report_to"
            ) from error
        replace_text(note, f"{self._run_id}\n")

    def _begin(self, run_name: str, config: Mapping[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vembed-ds")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run_id = str(self._client.create_run(experiment, run_name=run_name).info.run_id)
        settings = [self._param(key, str(value)) for key, value in flattened(config).items()]
        for start in range(0, len(settings), MOST_AT_ONCE):
            self._client.log_batch(run_id, params=settings[start : start + MOST_AT_ONCE])
        return run_id

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Send the metrics of one step."""
        now = int(1000 * time.time())
        rows = [
            self._metric(permitted_name(name), value, now, step) for name, value in metrics.items()
        ]
        self._client.log_batch(self._run_id, metrics=rows)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id)


def permitted_name(name: str) -> str:
    """What MLflow lets a metric be called: ``eval/recall@10`` is ``eval/recall_at_10`` there."""
    return name.replace("@", "_at_")


def flattened(config: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """``{"training": {"lr": 1}}`` as ``{"training.lr": 1}``; lists stay as they are."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flattened(value, prefix=f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
