"""Metrics of a run: always ``metrics.jsonl``, and the trackers that the user asked for."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vembed_ds.durable import write_failure
from vembed_ds.errors import ConfigError, StorageError, VembedError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb_run_id.txt"
CHOICES = ("none", "tensorboard", "wandb", "all")
MOST_WAITING = 10_000  # lines that are kept while they cannot be written


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
    report_to: str,
    *,
    folder: str | Path,
    run_name: str | None,
    config: Mapping[str, Any],
    resume_step: int = 0,
    patient: bool = False,
) -> Tracker:
    """Opens the trackers of a run. Rank 0 alone calls it.

    Args:
        report_to: ``none``, ``tensorboard``, ``wandb`` or ``all``; ``metrics.jsonl`` is
            written in any case.
        folder: Output folder of the run; made when it is missing.
        run_name: Name that the trackers show; None for the folder's.
        config: Resolved settings, shown beside the metrics.
        resume_step: Steps already made by the checkpoint that the run resumes from; what was
            logged for later steps is removed. 0 starts afresh: earlier metrics are removed.
        patient: As of :class:`MetricsFile`.

    Raises:
        ConfigError: When a tracker is unknown, not installed or does not start.
        VembedError: When ``metrics.jsonl`` cannot be read or written.
    """
    if report_to not in CHOICES:
        raise ConfigError(f"report_to={report_to!r}: expected one of {', '.join(CHOICES)}")
    folder = Path(folder)
    name = run_name or folder.absolute().name
    file = MetricsFile(folder / METRICS_FILE, resume_step=resume_step, patient=patient)
    sinks: dict[str, Sink] = {}
    if report_to in ("wandb", "all"):
        sinks["wandb"] = WandbSink(
            folder, run_name=name, config=config, report_to=report_to, resuming=resume_step > 0
        )
    if report_to in ("tensorboard", "all"):
        sinks["tensorboard"] = TensorBoardSink(
            folder / "tensorboard", config=config, resume_step=resume_step
        )
    return Tracker(file, sinks)


class MetricsFile:
    """One JSON object per logged step, on disk as soon as it is logged.

    Args:
        path: The file; its folder is made when it is missing.
        resume_step: Lines of later steps are removed; 0 removes all.
        patient: Keep lines that cannot be written, and write them with a later one.

    Raises:
        VembedError: When the file cannot be read or written.
    """

    def __init__(self, path: Path, *, resume_step: int, patient: bool = False) -> None:
        self.path, self.patient = path, patient
        self._waiting: deque[str] = deque(maxlen=MOST_WAITING)
        self._lost = 0
        self._failed = False
        self._whole_bytes: int | None = None  # behind them half a line may lie
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _kept_lines(path, resume_step) if resume_step and path.exists() else []
            _replace(path, "".join(kept))
        except OSError as error:
            raise self._failure(error) from error

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append one line; a value that JSON lacks (NaN, infinity) becomes null.

        Raises:
            VembedError: When the disk is full or gone, unless the file is patient.
        """
        values = {"step": step} | {key: _finite(key, v, step=step) for key, v in metrics.items()}
        self._lost += len(self._waiting) == MOST_WAITING
        self._waiting.append(json.dumps(values, allow_nan=False) + "\n")
        try:
            self._append("".join(self._waiting))
        except OSError as error:
            if not self.patient:
                raise self._failure(error) from error
            self._warn(error)
            return
        self._waiting.clear()
        self._failed = False

    def close(self) -> None:
        """Try once more to write what could not be written; what is lost is told, not raised."""
        if self.patient and self._waiting:
            try:
                self._append("".join(self._waiting))
            except OSError as error:
                self._lost += len(self._waiting)
                logger.error("%s: still cannot be written (%s)", self.path, error)
        if self._lost:
            logger.error("%s: %d lines are lost", self.path, self._lost)

    def _append(self, text: str) -> None:
        with self.path.open("ab") as stream:
            if self._whole_bytes is None:
                self._whole_bytes = stream.tell()
            else:
                stream.truncate(self._whole_bytes)
            stream.write(text.encode())
        self._whole_bytes = None

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            logger.warning(
                "on_save_error=warn: training goes on although %s: cannot be written (%s); up to "
                "%d lines are kept, and written as soon as there is room",
                self.path,
                error,
                MOST_WAITING,
            )
        self._failed = True

    def _failure(self, error: OSError) -> VembedError:
        kind = StorageError if write_failure(error, self.path).passing else VembedError
        return kind(
            f"{self.path}: cannot be written ({error}); free space or choose another output_dir"
        )


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
                "'vembed-ds[wandb]' or set report_to to tensorboard or none"
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
        except wandb.Error as error:
            raise ConfigError(
                f"report_to={report_to}: wandb cannot start ({' '.join(str(error).split())}); "
                "run wandb login, set WANDB_MODE=offline, or set report_to to tensorboard or none"
            ) from error
        _replace(note, f"{self._run.id}\n")

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Send the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is pending and end the run."""
        self._run.finish()


def _finite(name: str, value: float, *, step: int) -> float | None:
    if math.isfinite(value):
        return value
    logger.warning("step %d: %s is %s; %s holds null for it", step, name, value, METRICS_FILE)
    return None


def _kept_lines(path: Path, resume_step: int) -> list[str]:
    """Lines up to the resumed step; a last line that a crash cut off is none of them."""
    lines = path.read_bytes().splitlines(keepends=True)  # a damaged one may be no text
    if lines and not lines[-1].endswith(b"\n"):
        logger.warning("%s: removed an incomplete last line", path)
        lines.pop()
    return [
        line.decode()
        for number, line in enumerate(lines, 1)
        if _step(line, number, path) <= resume_step
    ]


def _step(line: bytes, number: int, path: Path) -> int:
    try:
        return int(json.loads(line.decode())["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise VembedError(
            f"{path}, line {number}: not a JSON object with a step; move the file away, or resume "
            "into another output_dir"
        ) from error


def _replace(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
