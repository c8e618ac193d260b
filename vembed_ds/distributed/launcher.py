"""The processes above a rank: the launcher that started it, and ``launch/restart.sh``."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vembed_ds.distributed.comm import local_rank

logger = logging.getLogger(__name__)

STATUS_FILE = "VEMBED_STATUS_FILE"  # the environment's name for it

# Programs and modules that start ranks and wait for them. What started those may end before them:
# a shell does, behind `nohup`.
_LAUNCHERS = {
    "vembed-ds",
    "vembed_ds",
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
}


def tell(word: str, value: object) -> None:
    """Say to ``launch/restart.sh`` what launchers do not pass on; nothing without it.

    The first rank of each machine speaks. torchrun makes 1 of every exit code, DeepSpeed's
    launcher makes 0 of its own death. A file that cannot be written is warned of, once: it must
    not end one rank of a run.

    Args:
        word: ``pid`` (machine and process to signal for a stop with a checkpoint), ``saved`` (of which step), or
            ``exit`` (with which code).
        value: Its value.
    """
    path = os.environ.get(STATUS_FILE)
    if not path or local_rank() != 0:
        return
    try:
        with Path(path).open("a") as file:
            file.write(f"{word} {value}\n")
    except OSError as error:
        if path not in _unwritable:
            _unwritable.add(path)
            logger.warning(
                "%s=%s: cannot be written (%s), so launch/restart.sh does not hear what this run "
                "does; make room, or let TMPDIR name another disk when it is started",
                STATUS_FILE,
                path,
                error.strerror or error,
            )


_unwritable: set[str] = set()


class Launcher:
    """The launcher of this process, if it has one: up to three processes above it."""

    def __init__(self) -> None:
        self._chain: list[tuple[int, int]] = []  # a process, and its parent
        process, parent = os.getpid(), os.getppid()
        while _program(parent) in _LAUNCHERS:
            self._chain.append((process, parent))
            process, parent = parent, _parent(parent)

    @property
    def gone(self) -> bool:
        """Whether one of its processes has ended: nobody waits for this rank any more.

        SIGTERM ends the ``deepspeed`` that a user started, and not what that had started.
        """
        return any(_parent(process) != parent for process, parent in self._chain)


def _program(process: int) -> str:
    """Its name; of a Python process that of the script or module."""
    try:
        line = Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    except OSError:
        return ""
    words = [word.rpartition("/")[2] for word in line.split("\0")]
    if words[0].startswith("python"):
        words = [word for word in words[1:] if not word.startswith("-")]
    return words[0] if words else ""


def _parent(process: int) -> int:
    """0: there is no such process any more."""
    if process == os.getpid():
        return os.getppid()
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything
