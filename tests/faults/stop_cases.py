"""What a rank of a test world runs: a training that gets signals at chosen moments."""

from __future__ import annotations

import errno
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed.train_cases import run_train
from vembed_ds.checkpointing import saver
from vembed_ds.command import exit_code
from vembed_ds.data.collators import Batch
from vembed_ds.data.waiting import take
from vembed_ds.distributed import comm
from vembed_ds.engine import checkpoint_files
from vembed_ds.errors import StoppedError, VembedError
from vembed_ds.training import loop, run, run_saving, stopping


def send(*names: str) -> None:
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


def run_stopped(
    *,
    moment: str,
    rank: int,
    signals: list[str],
    call: int = 1,
    failing: int = 0,
    **arguments: Any,
) -> dict[str, Any]:
    """As ``run_train``; ``signals`` come to ``rank`` at the ``call``-th such ``moment``.

    The first ``failing`` saves find no room.

    Besides the error: its exit code, how many saves there were, and whether the handlers from before
    were put back.
    """
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    mine = comm.rank() == rank
    calls, saves = 0, 0
    errors: list[StoppedError] = []

    def then(action: Callable[..., Any]) -> Callable[..., Any]:
        """``action``, in which the signals come."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if mine and calls == call:
                send(*signals)
            return action(*args, **kwargs)

        return wrapped

    save = run.save_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves > failing:
            return save(*args, **kwargs)
        with no_room():
            newest = save(*args, **kwargs)
            if unfinished := args[2]._unfinished:
                wait([unfinished[0]])
            return newest

    def noted(message: str) -> StoppedError:
        errors.append(StoppedError(message))
        return errors[-1]

    usual = loop.compute_gradient
    late_commit, noted_step = _meanwhile(saver.commit, usual, signals if mine else [])
    patches = {
        "step": (loop, "compute_gradient", then(loop.compute_gradient)),
        "evaluation": (loop.TrainingLoop, "embed", then(loop.TrainingLoop.embed)),
        "save": (run_saving, "describe_model", then(run_saving.describe_model)),
        "wait": (loop.TrainingLoop, "batches", _late(loop.TrainingLoop.batches, mine, signals)),
        "write": (saver, "commit", late_commit),
    }
    place, name, patched = patches[moment]
    with (
        mock.patch.object(loop, "compute_gradient", noted_step if moment == "write" else usual),
        mock.patch.object(run, "save_step", counted),
        mock.patch.object(loop, "StoppedError", noted),
        mock.patch.object(place, name, patched),
    ):
        result = run_train(**arguments)
    after = [signal.getsignal(number) for number in stopping.SIGNALS]
    codes = [exit_code(error) for error in errors]
    return {**result, "codes": codes, "saves": saves, "put back": before == after}


def _late(batches: Any, mine: bool, signals: list[str]) -> Any:
    """A loader whose second batch never comes, on the rank that gets the signals."""

    def wrapped(self: Any) -> Iterator[Batch]:
        if mine:
            self.loader = self.loader if self.step else waiting(self.loader, self._signals)
        return iter(batches(self))

    def waiting(loader: Any, listening: Any) -> Iterator[Batch]:
        yield next(iter(loader))
        threading.Timer(0.3, send, signals).start()
        never: queue.Queue[Batch] = queue.Queue()
        yield take(never, timeout_seconds=60, interrupted=listening.pending)

    return wrapped


def _meanwhile(commit: Any, compute: Any, signals: list[str]) -> tuple[Any, Any]:
    """``commit`` and ``compute``: the first commit lasts into the third step, where the signals come."""
    third, sent = threading.Event(), threading.Event()
    steps = 0

    def late_commit(*args: Any, **kwargs: Any) -> Any:
        if not sent.is_set():
            assert third.wait(60)
            send(*signals)
            sent.set()
            time.sleep(0.3)
        return commit(*args, **kwargs)

    def noted_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            third.set()
            assert sent.wait(60)
        return compute(*args, **kwargs)

    return late_commit, noted_step


@contextmanager
def no_room() -> Iterator[None]:
    """DeepSpeed's files cannot be written."""

    def full(path: Path, write: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with mock.patch.object(checkpoint_files, "write_hashed", full):
        yield


def exit_code_of_another_rank(*, error: VembedError | None, rank: int) -> int:
    """The code with which this rank ends when another one had an error."""
    try:
        comm.raise_together(error if comm.rank() == rank else None)
    except VembedError as raised:
        return exit_code(raised)
    return 0
