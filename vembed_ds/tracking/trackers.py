"""Metrics of a run: always ``metrics.jsonl`` and ``metrics.csv``, and the trackers that the user asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vembed_ds.errors import ConfigError
from vembed_ds.tracker_names import tracker_names
from vembed_ds.tracking.metrics_file import METRICS_FILE, MetricsFile
from vembed_ds.tracking.metrics_table import TABLE_FILE, MetricsTable
from vembed_ds.tracking.mlflow_sink import MlflowSink
from vembed_ds.tracking.swanlab_sink import SwanlabSink
from vembed_ds.tracking.tensorboard_sink import TensorBoardSink
from vembed_ds.tracking.wandb_sink import WandbSink

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One place that metrics go to."""

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write the metrics of one step."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


@dataclass
class Tracker:
    """Hands metrics to the file, whose failures may stop the run, and to sinks, whose do not.

    Args:
        file: Writes ``metrics.jsonl``.
        sinks: The others, by name.
    """

    file: MetricsFile
    sinks: Mapping[str, Sink] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set, init=False)

    def add(self, name: str, sink: Sink) -> None:
        """Hand metrics to another sink too, from now on."""
        self.sinks = {**self.sinks, name: sink}

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write the metrics of one step everywhere.

        Args:
            metrics: Name, such as ``train/loss``, to value.
            step: Global step, the number of optimizer steps made.

        Raises:
            VembedError: When ``metrics.jsonl`` cannot be written, unless it is patient.
        """
        self.file.write(metrics, step=step)
        for name, sink in self.sinks.items():
            self._guarded(name, partial(sink.write, metrics, step=step))

    def close(self) -> None:
        """Finish every sink; call it once, when the run ends."""
        self.file.close()
        for name, sink in self.sinks.items():
            self._guarded(name, sink.close)

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # a tracker may raise anything; training is worth more
            if name not in self._failed:
                self._failed.add(name)
                logger.warning(
                    "%s failed; training goes on, %s is complete, later failures are not reported",
                    name,
                    METRICS_FILE,
                    exc_info=True,
                )


def build_tracker(
    report_to: str | Sequence[str],
    *,
    folder: str | Path,
    run_name: str | None,
    config: Mapping[str, Any],
    resume_step: int = 0,
    patient: bool = False,
) -> Tracker:
    """Opens the trackers of a run. Rank 0 alone calls it.

    Args:
        report_to: As of :func:`vembed_ds.tracker_names.tracker_names`; ``metrics.jsonl`` and
            ``metrics.csv`` are written in any case.
        folder: Output folder of the run; made when it is missing.
        run_name: Name that the trackers show; None for the folder's.
        config: Resolved settings, shown beside the metrics.
        resume_step: Steps already made by the checkpoint that the run resumes from; what was
            logged for later steps is removed. 0 starts afresh: earlier metrics are removed.
        patient: As of :class:`MetricsFile`.

    Raises:
        ConfigError: When a tracker is unknown, not installed or does not start.
        VembedError: When ``metrics.jsonl`` cannot be read, or it or ``metrics.csv`` written.
    """
    try:
        names = tracker_names(report_to)
    except ValueError as error:
        raise ConfigError(f"report_to={report_to!r}: {error}") from error
    folder = Path(folder)
    file = MetricsFile(folder / METRICS_FILE, resume_step=resume_step, patient=patient)
    sinks: dict[str, Sink] = {TABLE_FILE: MetricsTable(folder / TABLE_FILE, source=file.path)}
    service: dict[str, Any] = {
        "run_name": run_name or folder.absolute().name,
        "config": config,
        "report_to": report_to if isinstance(report_to, str) else ",".join(report_to),
        "resuming": resume_step > 0,
    }
    builders: dict[str, Callable[[], Sink]] = {
        "wandb": lambda: WandbSink(folder, **service),
        "swanlab": lambda: SwanlabSink(folder, **service),
        "mlflow": lambda: MlflowSink(folder, **service),
        "tensorboard": lambda: TensorBoardSink(
            folder / "tensorboard", config=config, resume_step=resume_step
        ),
    }
    # TensorBoard last: where a service cannot start, no event file is left.
    sinks |= {name: build() for name, build in builders.items() if name in names}
    return Tracker(file, sinks)
