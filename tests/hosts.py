"""Machines made of network namespaces: own addresses, own names, own sshd, one disk.

They need root, ``ip``, ``sshd`` and ``pdsh`` (Debian: iproute2, openssh-server, pdsh).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare")
INTERFACE = "eth0"  # the same on every machine, as GLOO_SOCKET_IFNAME wants it
PORT = 22  # nothing on this machine has it: every namespace has ports of its own

SSHD = """\
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
PidFile none
"""
SSH = """\
Host *
  IdentityFile {folder}/user_key
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""


class Hosts:
    """``count`` machines on one bridge.

    Args:
        count: How many.
        folder: For keys and settings.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder
        number = os.getpid() % 250 + 1
        self._bridge = f"vembed-{number}"
        self._spaces = [f"{self._bridge}-{index}" for index in range(count)]
        self._links = [f"ve{number}-{index}" for index in range(count)]
        self.addresses = [f"10.213.{number}.{index + 1}" for index in range(count)]

    def start(self) -> None:
        """Make the network, and a ssh server on every machine."""
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        for space, link, address in zip(self._spaces, self._links, self.addresses, strict=True):
            _ip("netns", "add", space)
            _ip("link", "add", link, "type", "veth", "peer", "name", INTERFACE, "netns", space)
            _ip("link", "set", link, "master", self._bridge, "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", space, "link", "set", INTERFACE, "up")
            _ip("-n", space, "link", "set", "lo", "up")
        self._write_settings()
        for index in range(len(self._spaces)):
            server = [_program("sshd"), "-f", str(self.folder / "sshd_config")]
            subprocess.run(self.inside(index, server), check=True, timeout=20)

    def inside(self, index: int, command: Sequence[str]) -> list[str]:
        """``command`` as run on a machine; to be run with :meth:`environment`."""
        named = ["sh", "-c", f'hostname host-{index}; exec "$@"', "sh", *command]
        return [_program("ip"), "netns", "exec", self._spaces[index], "unshare", "--uts", *named]

    def environment(self) -> dict[str, str]:
        """Where ``ssh`` knows these machines, and what dead connections are noticed by."""
        programs = f"{self.folder}{os.pathsep}{Path(sys.executable).parent}"
        return {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=1 -o ServerAliveCountMax=3",
        }

    def hostfile(self) -> Path:
        """One rank on every machine."""
        path = self.folder / "hosts"
        path.write_text("".join(f"{address} slots=1\n" for address in self.addresses))
        return path

    def cut_off(self, index: int) -> None:
        """Pull a machine's cable."""
        _ip("link", "set", self._links[index], "down")

    def connect(self, index: int) -> None:
        """Put it in again."""
        _ip("link", "set", self._links[index], "up")

    def processes(self, index: int, *, of: str = "") -> list[int]:
        """Of a machine, those in whose command line ``of`` stands."""
        done = subprocess.run(
            [_program("ip"), "netns", "pids", self._spaces[index]],
            check=False,
            capture_output=True,
            text=True,
        )
        return [number for number in map(int, done.stdout.split()) if of in _command_line(number)]

    def close(self) -> None:
        """End what runs on the machines, and take them away, whole or half made."""
        for index, space in enumerate(self._spaces):
            for process in self.processes(index):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            subprocess.run(
                [_program("ip"), "netns", "del", space], check=False, capture_output=True
            )
        for link in (*self._links, self._bridge):
            subprocess.run([_program("ip"), "link", "del", link], check=False, capture_output=True)

    def _write_settings(self) -> None:
        for name in ("host_key", "user_key"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(key, check=True)
        (self.folder / "sshd_config").write_text(SSHD.format(port=PORT, folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        # The client reads only the settings of the user's real home; so does the one of pdsh.
        ssh = self.folder / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {_program("ssh")} -F {self.folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """:class:`Hosts` that end with the tests; skips these where none can be made."""
    _require_means()
    made = Hosts(count, folder)
    try:
        try:
            made.start()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error} {error.stderr or ''}")
        yield made
    finally:
        made.close()


def _require_means() -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if missing := [name for name in PROGRAMS if not _program(name)]:
        pytest.skip(f"not installed: {', '.join(missing)} (iproute2, openssh-server, pdsh)")


def _program(name: str) -> str:
    """Its path; empty: it is not installed."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or ""


def _ip(*words: str) -> None:
    subprocess.run([_program("ip"), *words], check=True, capture_output=True, text=True, timeout=20)


def _command_line(process: int) -> str:
    try:
        text = Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    except OSError:
        return ""
    return text.replace("\0", " ")
