"""One run at a time in an output folder.

Rank 0 holds a lock of the operating system on ``run.lock``, which dies with the process; the file says
whose it is. On a network file system such a lock may count on one machine only, or not exist.
So the holder also touches the file while it lives, and whoever finds the file of another machine
looks for a while whether it is touched. The clocks of the machines are not compared.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

from vembed_ds.errors import ConfigError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LOCK_FILE = "run.lock"
TOUCH_SECONDS = 10.0
# Network file systems may show an old time for some seconds.
LOOK_SECONDS = 45.0
# A run that was ended a moment ago may take so long to be gone.
ENDING_SECONDS = 5.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class RunLock:
    """Held from here on, until it is released or the process ends.

    Args:
        folder: Of the run; exists.
        made: Folders that were made for it, itself and above it, the innermost first.
        setting: That names the folder, for messages.

    Raises:
        ConfigError: Another run is in the folder.
        OSError: The file cannot be written.
    """

    def __init__(
        self, folder: Path, *, made: Sequence[Path] = (), setting: str = "output_dir"
    ) -> None:
        self.folder = folder
        self._setting = setting
        self._made = made
        self._kept = False
        self._free = threading.Event()
        while not self._open():
            pass
        threading.Thread(target=self._touch, name="run.lock", daemon=True).start()

    def keep(self) -> None:
        """The run begins to write: what it made for the lock stays."""
        self._kept = True

    def release(self) -> None:
        """Let others in; a run that never began leaves nothing behind."""
        if self._free.is_set():
            return
        self._free.set()
        # On a disk that is gone the next run finds out by itself; what ended this one is to be told.
        with suppress(OSError):
            self._write("")
        with suppress(OSError):
            if self._is_new and not self._kept:
                (self.folder / LOCK_FILE).unlink()
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):  # somebody has put something there
            for folder in () if self._kept else self._made:
                folder.rmdir()

    def close(self) -> None:
        """Forget the file without a word: this process is a child, and the lock is the parent's."""
        self._file.close()

    def _open(self) -> bool:
        """Whether the file is now this run's, and not one that another has removed meanwhile."""
        path = self.folder / LOCK_FILE
        self._is_new = not path.exists()
        self._file = path.open("a+")
        try:
            self._take()
            if _is_same(self._file, path):
                self._write(_this_run())
                return True
        except BaseException:
            self._file.close()
            raise
        self._file.close()
        return False

    def _take(self) -> None:
        locks_work = self._lock()
        holder = self._holder()
        if not holder:
            return
        if (holder.get("host") != platform.node() or not locks_work) and self._is_touched(holder):
            raise self._refusal(holder)
        logger.info(
            "%s: its run on host %s, pid %s, ended without a goodbye", self.folder, *_who(holder)
        )

    def _lock(self) -> bool:
        """Whether the file system has locks; then this process holds it."""
        deadline = time.monotonic() + ENDING_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._refusal(self._holder()) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning(
                    "%s: this file system has no locks (%s): two runs that start within a minute in "
                    "one folder would not notice each other",
                    self.folder,
                    os.strerror(error.errno),
                )
                return False
            time.sleep(0.2)

    def _is_touched(self, holder: dict[str, Any]) -> bool:
        """Whether the run that the file names still lives."""
        logger.warning(
            "%s is in use by host %s, pid %s; looking for %.0f s whether that run lives",
            self.folder,
            *_who(holder),
            LOOK_SECONDS,
        )
        first = _touched(self.folder)
        deadline = time.monotonic() + LOOK_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, LOOK_SECONDS / 10))
            if _touched(self.folder) != first:
                return True
        return False

    def _refusal(self, holder: dict[str, Any]) -> ConfigError:
        host, pid = _who(holder)
        return ConfigError(
            f"{self._setting}={str(self.folder)!r}: another run is using it: host {host}, pid {pid}, since "
            f"{holder.get('started', '?')} ({holder.get('command', '?')}). End that run, or give this one "
            f"another {self._setting}; {self.folder / LOCK_FILE} may be removed only when that process is "
            "gone"
        )

    def _holder(self) -> dict[str, Any]:
        self._file.seek(0)
        text = self._file.read()
        if not text:
            return {}
        try:
            found = json.loads(text)
        except ValueError:
            return {"host": "?", "pid": "?"}  # half written, or none of ours
        return found if isinstance(found, dict) else {}

    def _write(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _touch(self) -> None:
        while not self._free.wait(TOUCH_SECONDS):
            try:
                os.utime(self._file.fileno())
            except (OSError, ValueError):  # the disk, or closed meanwhile
                continue


_held: list[RunLock] = []


def _forget_in_child() -> None:
    for lock in _held:
        lock.close()


# A forked child would keep the lock alive; a child that runs another program never gets it.
os.register_at_fork(after_in_child=_forget_in_child)


def lock_output(folder: Path, *, made: Sequence[Path] = (), setting: str = "output_dir") -> None:
    """Lock the folder of this run. One rank of a disk; :func:`frees_output` gives it back.

    Args:
        folder: Exists.
        made: As of :class:`RunLock`.
        setting: As of :class:`RunLock`.

    Raises:
        ConfigError: Another run is in the folder; names its host and process.
        OSError: The file cannot be written.
    """
    _held.append(RunLock(folder, made=made, setting=setting))


def keep_output() -> None:
    """From here on the run leaves its folder and its lock file behind, whatever it ends by."""
    for lock in _held:
        lock.keep()


def frees_output(work: Callable[P, T]) -> Callable[P, T]:
    """Give back what :func:`lock_output` has locked when ``work`` ends, however it ends."""

    @functools.wraps(work)
    def freeing(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        finally:
            while _held:
                _held.pop().release()

    return freeing


def _this_run() -> str:
    return json.dumps(
        {
            "host": platform.node(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": " ".join(sys.argv),
        }
    )


def _who(holder: dict[str, Any]) -> tuple[object, object]:
    return holder.get("host", "?"), holder.get("pid", "?")


def _is_same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _touched(folder: Path) -> int:
    """When the file was last touched, by the server's clock; opening it asks the server."""
    with (folder / LOCK_FILE).open() as file:
        return os.fstat(file.fileno()).st_mtime_ns
