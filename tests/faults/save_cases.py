"""What a rank runs in the tests of whole runs whose disk is full, or whose metrics cannot be written."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed.train_cases import run_train
from vembed_ds.command import exit_code
from vembed_ds.config.loading import load_config
from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError
from vembed_ds.tracking.trackers import METRICS_FILE, MetricsFile
from vembed_ds.training import loop, run

_PAGE = 4096


def run_on_full_disk(
    *, config: str, room_at: tuple[int, int] | None, **arguments: Any
) -> dict[str, Any]:
    """As ``run_train``; the disk of output_dir is full behind the first step.

    Args:
        config: Path of the configuration.
        room_at: Step, and which try to save it, before which there is room again; ``None``: never.
        arguments: Of ``run_train``.
    """
    out = Path(load_config(Path(config), []).run.output_dir)
    filler = out / "filler"
    compute, save = loop.compute_gradient, run.save_step
    steps, tries = 0, 0

    def in_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2 and comm.is_main():
            _fill_up(out / METRICS_FILE)
            _fill(filler)
        return compute(*args, **kwargs)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal tries
        tries += room_at is not None and args[-1] == room_at[0]
        if comm.is_main() and room_at is not None and tries == room_at[1]:
            filler.unlink(missing_ok=True)
        comm.barrier()
        return save(*args, **kwargs)

    with (
        mock.patch.object(loop, "compute_gradient", in_step),
        mock.patch.object(run, "save_step", counted),
    ):
        return _with_code(config=config, **arguments)


def run_without_metrics(**arguments: Any) -> dict[str, Any]:
    """As ``run_train``; the third line of metrics.jsonl cannot be written."""
    append, lines = MetricsFile._append, 0

    def full(self: MetricsFile, text: str) -> None:
        nonlocal lines
        lines += 1
        if lines == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, text)

    with mock.patch.object(MetricsFile, "_append", full):
        return _with_code(**arguments)


def _with_code(**arguments: Any) -> dict[str, Any]:
    """As ``run_train``, with the code that the command would end with."""
    codes = [0]
    with mock.patch("tests.distributed.train_cases.train", _noting(codes)):
        result = run_train(**arguments)
    return {**result, "code": codes[-1]}


def _noting(codes: list[int]) -> Any:
    def train(*args: Any, **kwargs: Any) -> Any:
        try:
            return run.train(*args, **kwargs)
        except VembedError as error:
            codes.append(exit_code(error))
            raise

    return train


def _fill_up(metrics: Path) -> None:
    """Lengthen the file to whole pages: the rest of a page would take more lines on a full disk."""
    missing = -metrics.stat().st_size % _PAGE
    line = '{"step": 1, "padding": ""}\n'
    missing += _PAGE if missing < len(line) else 0
    with metrics.open("a") as file:
        file.write(line.replace('""', f'"{"x" * (missing - len(line))}"'))


def _fill(path: Path) -> None:
    """Write until the disk has no byte left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * _PAGE):
            pass
