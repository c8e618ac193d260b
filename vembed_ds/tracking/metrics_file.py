"""``metrics.jsonl``: a JSON object per line of the log."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from vembed_ds.durable import write_failure
from vembed_ds.errors import StorageError, VembedError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
MOST_WAITING = 10_000  # lines that are kept while they cannot be written


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
