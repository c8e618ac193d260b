"""The DeepSpeed launcher as a child: signals that stop a run with its checkpoint, and its exit code.

The launcher alone ends at SIGTERM without waiting for its ranks, gives 0 when its own child was
killed, and ends with a traceback at Ctrl-C. So it gets a session of its own; a signal to this
process is passed to a rank, which stops all, and the exit code is what the ranks said.
"""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vembed_ds.distributed.announced import DEFAULT_PORT
from vembed_ds.launching.flags import words
from vembed_ds.launching.remote import (
    exported,
    pdsh_word,
    require_plain,
    without_secrets,
    write_environment,
)

STATUS_FILE = "VEMBED_STATUS_FILE"  # vembed_ds.distributed.launcher writes it
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Without these pdsh waits two hours for a machine that has gone, long after all ranks have ended.
_SSH_FLAGS = "-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_SSH_FAILED = 255  # pdsh gives the largest code of all machines
_UNEXPECTED, _TO_MEND = 1, 2
_PATHS = ("venv_script", "enable_each_rank_log")  # which the launcher hands to shells as they are


def launch(module: str, arguments: Sequence[str], *, flags: Mapping[str, Any], by_ssh: bool) -> int:
    """Start ``module`` on the ranks that ``flags`` describe, and wait for them.

    Args:
        module: Such as ``vembed_ds.train``.
        arguments: Of the module.
        flags: Of the launcher; they must be consistent.
        by_ssh: Whether the launcher reaches its machines from here.

    Returns:
        The exit code: what the first rank of this machine said; else the launcher's.

    Raises:
        ConfigError: This folder, or that of Python, cannot be named to other machines.
    """
    if _by_pdsh(flags, by_ssh=by_ssh):
        require_plain(folder=Path.cwd(), interpreter=sys.executable)
    with tempfile.TemporaryDirectory(prefix="vembed-launch-") as folder:
        environment = without_secrets(os.environ) if by_ssh else {**os.environ}
        environment.setdefault(STATUS_FILE, str(Path(folder) / "status"))
        Path(environment[STATUS_FILE]).touch()
        if by_ssh:
            by_pdsh = _by_pdsh(flags, by_ssh=by_ssh)
            variables = exported(os.environ, [Path.home(), Path.cwd()], by_pdsh=by_pdsh)
            write_environment(Path(folder) / "environment", _meeting_place(flags) | variables)
            environment["DS_ENV_FILE"] = str(Path(folder) / "environment")
            given = environment.get("PDSH_SSH_ARGS_APPEND", "")  # of two values ssh takes the first
            environment["PDSH_SSH_ARGS_APPEND"] = f"{given} {_SSH_FLAGS}".strip()
        command = launcher_command(module, arguments, flags=flags, by_ssh=by_ssh)
        return _Child(command, environment, by_ssh=by_ssh).wait()


def launcher_command(
    module: str, arguments: Sequence[str], *, flags: Mapping[str, Any], by_ssh: bool
) -> list[str]:
    """The DeepSpeed launcher's command line."""
    by_pdsh = _by_pdsh(flags, by_ssh=by_ssh)
    if by_pdsh:
        flags = {
            key: shlex.quote(value).replace("%", "%%") if key in _PATHS else value
            for key, value in flags.items()
        }
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *words({"log_level": "error", **flags, "no_local_rank": True}),
        *("--module", module),
        *((pdsh_word(word) for word in arguments) if by_pdsh else arguments),
    ]


def _by_pdsh(flags: Mapping[str, Any], *, by_ssh: bool) -> bool:
    return by_ssh and flags.get("launcher", "pdsh").lower() == "pdsh"


def _meeting_place(flags: Mapping[str, Any]) -> dict[str, str]:
    """Of Open MPI's ranks, to whom DeepSpeed says nothing of it."""
    if flags.get("launcher", "").lower() != "openmpi":
        return {}
    port = flags.get("master_port", DEFAULT_PORT)
    return {"MASTER_ADDR": flags["master_addr"], "MASTER_PORT": str(port)}


class _Child:
    """A launcher that runs, the status file of its ranks, and who asked it to stop."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, by_ssh: bool
    ) -> None:
        self._command = list(command)
        self._by_ssh = by_ssh  # then ranks may be elsewhere only, whose status files are not ours
        self._environment = dict(environment)
        self._status = Path(environment[STATUS_FILE])
        self._process: subprocess.Popen[bytes] | None = None
        self._signals = 0

    def wait(self) -> int:
        """Start it; gives the exit code of the whole."""
        before = {number: signal.signal(number, self._stop) for number in _STOPPING}
        try:
            self._process = subprocess.Popen(
                self._command, env=self._environment, start_new_session=True
            )
            if self._signals:  # it came while the process was made
                self._ask(self._process)
            return self._outcome(self._process.wait())
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _outcome(self, code: int) -> int:
        said = int(self._told("exit") or "0")
        if said and code != _TO_MEND:
            return said
        if code == 0 and not self._by_ssh and self._told("exit") is None:
            _say(
                "the launcher ended with 0, but no rank said that it is done: its ranks were killed"
            )
            return _UNEXPECTED
        if code == _SSH_FAILED and self._by_ssh:
            _say("the connection to a machine broke, or could not be made: see above which")
            return _UNEXPECTED
        return code if code >= 0 else 128 - code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks the ranks, the second ends the launcher, the third kills it all."""
        process = self._process
        self._signals += 1
        if process is None or process.poll() is not None:
            return
        if self._signals == 1:
            self._ask(process)
        else:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL if self._signals > 2 else signal.SIGTERM)

    def _ask(self, process: subprocess.Popen[bytes]) -> None:
        rank = self._told(f"pid {platform.node()}")
        if rank is not None and Path(f"/proc/{rank}").exists():
            _say("asking the ranks to stop with a checkpoint")
            os.kill(int(rank), signal.SIGTERM)
        elif self._by_ssh:
            _say("asking the launchers of all machines to stop; wait for the ranks before resuming")
            process.terminate()  # it ends them by ssh
        else:
            os.killpg(process.pid, signal.SIGTERM)  # the ranks are still loading

    def _told(self, word: str) -> str | None:
        """What a rank said last of ``word``."""
        told = [
            line.removeprefix(f"{word} ")
            for line in self._status.read_text().splitlines()
            if line.startswith(f"{word} ")
        ]
        return told[-1] if told else None


def _say(text: str) -> None:
    with suppress(OSError):  # a terminal that is gone must not keep the ranks from stopping
        os.write(2, f"vembed-ds: {text}\n".encode())
