"""Being a rank for a while, in a process that was there before and goes on afterwards.

A plain process or a notebook is a world of 1 while it trains: the process group, the variables that
describe it and the number of threads are as before when the work ends. Under a launcher the world is
that of the launcher; it is joined once, and left when the script ends.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vembed_ds.command import (
    LOG_FORMAT,
    LOG_TIME,
    SHUTDOWN_SECONDS,
    exit_code,
    quiet_libraries,
    start_rank,
)
from vembed_ds.errors import ConfigError, VembedError

_training = threading.Lock()


@contextmanager
def alone_in_process() -> Iterator[None]:
    """Refuse a second training beside one that runs in another thread: they would share a rank.

    Raises:
        ConfigError: One runs.
    """
    if not _training.acquire(blocking=False):
        raise ConfigError(
            "train: another training runs in this process, in another thread; wait for its end, or "
            "start a process for each"
        )
    try:
        yield
    finally:
        _training.release()


@contextmanager
def memory_freed() -> Iterator[None]:
    """Give back at the end what nobody holds any more."""
    try:
        yield
    finally:
        from vembed_ds.engine.release import free_memory

        free_memory()


@contextmanager
def joined(*, timeout_minutes: float) -> Iterator[None]:
    """Be a rank inside: of the launcher's world, or of a world of 1. Every rank enters it.

    Args:
        timeout_minutes: As of :func:`comm.init_distributed`.

    Raises:
        DistributedError: The ranks do not meet.
    """
    quiet_libraries()
    from vembed_ds.distributed import comm

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        if comm.is_joined():
            comm.require_host_exchange()
            yield
        elif comm.is_launched():
            comm.raise_together(start_rank(timeout_minutes))
            atexit.register(_leave)
            yield
        else:
            with _as_before():
                comm.raise_together(start_rank(timeout_minutes))
                yield


@contextmanager
def _as_before() -> Iterator[None]:
    """Undo at the end what a world of 1 changes in the process."""
    import torch

    from vembed_ds.distributed import comm
    from vembed_ds.engine.communication import leave_deepspeed

    variables = {name: os.environ.get(name) for name in comm.WORLD_VARIABLES}
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        comm.shutdown()
        leave_deepspeed()
        torch.set_num_threads(threads)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _leave() -> None:
    """At the end of a script under a launcher; one that ends by an error tells the other ranks."""
    from vembed_ds.distributed import comm

    error: BaseException | None = getattr(sys, "last_value", None)
    if error is None:
        comm.shutdown()
        return
    comm.say_last_words(error, code=exit_code(error))
    if not comm.shutdown(timeout_seconds=SHUTDOWN_SECONDS):
        sys.stderr.flush()
        os._exit(1)  # the others wait for this rank in a collective: let them see it gone


@contextmanager
def logs_shown() -> Iterator[None]:
    """Show rank 0's lines where nobody has configured logging, as in a notebook."""
    from vembed_ds.distributed import comm

    root, ours = logging.getLogger(), logging.getLogger("vembed_ds")
    level, handler = ours.level, logging.StreamHandler()
    handler.setFormatter(logging.Formatter(LOG_FORMAT, LOG_TIME))
    configured = ours.hasHandlers() or level != logging.NOTSET
    if not comm.is_main():
        ours.setLevel(logging.ERROR)
    elif not configured:
        ours.setLevel(logging.INFO)
    if not configured:
        root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(level)


@contextmanager
def explained() -> Iterator[None]:
    """Say which rank broke an exchange; let errors that need no debugger hold no memory.

    Raises:
        VembedError: In place of what a broken exchange raises.
    """
    from vembed_ds.distributed import comm, launcher

    try:
        yield
    except Exception as error:
        found = comm.explain(error)
        launcher.tell("exit", exit_code(found or error))
        if found is not None:
            raise found from error
        if isinstance(error, VembedError):
            _let_go(error)
        raise
    except KeyboardInterrupt as error:
        _let_go(error)
        raise


def _let_go(error: BaseException) -> None:
    """Clear the frames of an error: a notebook keeps it, and with it model, engine and batches."""
    found: Any = error
    while found is not None:
        with contextlib.suppress(RuntimeError):
            traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__
