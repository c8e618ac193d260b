"""Worker processes that prepare parts of batches.

Three rules, each the answer to a hang that was seen or made:

* No worker is forked from a process that trains. Its threads (gloo, trackers, Arrow) may hold
  a lock at that moment, which nobody would ever release in the copy. Workers are forked from
  a *fork server*, a process that has imported what they need and runs nothing else.
* The training process never reads from a worker itself, one thread per worker does: a worker
  that is killed or stops in the middle of an answer blocks that thread only.
* Every wait has a limit, and ends in a ``Batch`` with an error, on which the ranks agree.

A worker ends when its connection does, so that none outlives a rank that was killed.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from types import FunctionType, ModuleType, TracebackType
from typing import Any, Self

import torch
from torch.utils.data import Dataset

from vembed_ds.data import transport
from vembed_ds.data.collators import Batch, collate
from vembed_ds.data.dataset import Sample
from vembed_ds.data.sampler import SampleKey, StreamedRow
from vembed_ds.data.waiting import never, take
from vembed_ds.errors import ConfigError, VembedError, WorkerError

Keys = Sequence[SampleKey] | Sequence[StreamedRow] | Sequence[int]
Samples = Dataset[Sample | VembedError]

LAZY_MODULES = ("kornia.augmentation",)  # imported while unpickling: 0.6 s in every worker
IN_WORKER = 2  # parts: one that is prepared, and the next, so that the worker never idles
CLOSE_SECONDS = 5.0


class WorkerPool:
    """``num_workers`` processes with a copy of the data set each; a context manager.

    Parts go round robin, and results come in the order of ``submit``.

    Args:
        dataset: Must pickle; a memory-mapped table travels as the name of its file.
        num_workers: Number of processes, > 0.
        timeout_seconds: Longest wait for a result.
        interrupted: Whether a result is not wanted any more; asked while waiting for it.

    Raises:
        ConfigError: When the data set cannot be sent to other processes.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        num_workers: int,
        timeout_seconds: float,
        interrupted: Callable[[], bool] = never,
    ) -> None:
        payload, modules = _pickled(dataset)
        _start_server(modules)
        names = [f"loader process {number + 1} of {num_workers}" for number in range(num_workers)]
        self._timeout_seconds, self._interrupted = timeout_seconds, interrupted
        self._workers = [_Worker(payload, name=name) for name in names]
        self._submitted = self._taken = 0

    def __enter__(self) -> Self:
        # multiprocessing would ask them to end by a signal that they ignore, and then wait.
        atexit.register(self._kill)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kill()
        atexit.unregister(self._kill)
        for worker in self._workers:
            worker.join()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()

    @property
    def outstanding(self) -> int:
        """Parts that were submitted and not yet taken."""
        return self._submitted - self._taken

    def submit(self, keys: Keys) -> None:
        """Gives the next part to the next worker; never waits."""
        self._workers[self._submitted % len(self._workers)].submit(keys)
        self._submitted += 1

    def result(self) -> Batch:
        """The oldest part that was not yet taken.

        Returns:
            The part, or one with an ``error`` when it could not be prepared, or the worker
            ended or gave no answer in time.

        Raises:
            WaitInterrupted: It is not wanted any more; the pool can only be closed then.
        """
        worker = self._workers[self._taken % len(self._workers)]
        self._taken += 1
        return worker.result(self._timeout_seconds, self._interrupted)


def prepare_server(dataset: Samples) -> None:
    """Lets the fork server import what the workers need, while this process goes on."""
    _start_server(_pickled(dataset)[1])


class _Worker:
    """One process, and the thread that talks to it."""

    def __init__(self, payload: bytes, *, name: str) -> None:
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, payload, os.getcwd()),  # noqa: PTH109 (a word, not a path to use)
            name=name,
            daemon=True,  # ended with this process, even when it is stuck
        )
        with _without_main():
            self._process.start()
        theirs.close()
        self._requests: queue.SimpleQueue[Keys] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._submitted: queue.SimpleQueue[Keys] = queue.SimpleQueue()
        self._failure: Batch | None = None
        threading.Thread(target=self._exchange, name=name, daemon=True).start()

    def submit(self, keys: Keys) -> None:
        self._submitted.put(keys)
        self._requests.put(keys)

    def result(self, timeout_seconds: float, interrupted: Callable[[], bool]) -> Batch:
        keys = self._submitted.get_nowait()
        if self._failure is not None:
            return self._failure
        try:
            answer = take(self._answers, timeout_seconds=timeout_seconds, interrupted=interrupted)
        except queue.Empty:
            problem = (
                f"gave no answer for {timeout_seconds:g} s; is a file system stuck, or "
                "loader_timeout_seconds too short?"
            )
        else:
            if answer is not None:
                return answer
            problem = self._end()
        self._failure = Batch([], error=WorkerError(self._described(problem, keys)))
        return self._failure

    def kill(self) -> None:
        self._process.kill()  # it holds nothing that needs an orderly end
        self._requests.put(())  # wakes the thread, which finds the connection closed

    def join(self) -> None:
        self._process.join(CLOSE_SECONDS)

    def _exchange(self) -> None:
        """Moves requests and answers until the connection ends; runs in the thread."""
        inside = 0
        try:
            while True:
                while inside < IN_WORKER and not (inside and self._requests.empty()):
                    self._connection.send(self._requests.get())
                    inside += 1
                self._answers.put(transport.receive(self._connection))
                inside -= 1
        except (EOFError, OSError):
            self._answers.put(None)

    def _end(self) -> str:
        self._process.join(CLOSE_SECONDS)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return (
                f"was killed by {name}, which is often the system being out of memory; "
                "lower num_workers or prefetch_factor"
            )
        return f"ended with exit code {code}; its own message is above"

    def _described(self, problem: str, keys: Keys) -> str:
        rows = ", ".join(str(_row(key)) for key in keys)
        return f"{self._process.name} (pid {self._process.pid}), at records {rows}: {problem}"


def _serve(connection: Connection, payload: bytes, folder: str) -> None:
    """The life of a worker: parts in, parts out, until the connection ends."""
    # The training process decides; launchers send to its children too what asks it to stop.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.chdir(folder)  # relative paths mean the same as there
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # the default would start one thread per core in each worker
    dataset = pickle.loads(payload)
    try:
        while True:
            keys = connection.recv()
            transport.send(connection, _prepared(dataset, keys))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _prepared(dataset: Any, keys: Keys) -> Batch:
    try:
        return collate([dataset[key] for key in keys])
    except Exception:  # noqa: BLE001 (the training process reports it, on every rank)
        rows = ", ".join(str(_row(key)) for key in keys)
        trace = traceback.format_exc()
        return Batch([], error=VembedError(f"a loader process failed at records {rows}:\n{trace}"))


def _row(key: SampleKey | StreamedRow | int) -> int | str:
    if isinstance(key, StreamedRow):
        return f"{key.number} of shard {key.shard}"
    return key.index if isinstance(key, SampleKey) else key


class _Pickler(pickle.Pickler):
    """Notes the modules that whoever unpickles will import."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.modules: set[str] = set()

    def reducer_override(self, value: Any) -> Any:
        kind = value if isinstance(value, type | FunctionType) else type(value)
        if kind.__module__ == "__main__":
            raise ConfigError(
                f"num_workers: {kind.__qualname__} is defined in the script that was started, "
                "which loader processes do not run; move it to a module of its own, or set "
                "num_workers: 0"
            )
        self.modules.add(kind.__module__)
        return NotImplemented


def _pickled(dataset: Samples) -> tuple[bytes, set[str]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(dataset)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"num_workers: the data set cannot be sent to loader processes ({error}); "
            "set num_workers: 0"
        ) from error
    return file.getvalue(), pickler.modules


def _start_server(modules: set[str]) -> None:
    """Starts the fork server of this process, unless it runs already."""
    if multiprocessing.current_process().daemon:
        raise ConfigError(
            "num_workers: a daemonic process may not start loader processes; set num_workers: 0"
        )
    lazy = [name for name in LAZY_MODULES if name in sys.modules]
    forkserver.set_forkserver_preload([__name__, *sorted(modules), *lazy])
    forkserver.ensure_running()


@contextmanager
def _without_main() -> Iterator[None]:
    """Keeps workers from running the user's script again, which rarely expects it.

    ``multiprocessing`` would import it in every worker. Nothing that is sent comes from it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
