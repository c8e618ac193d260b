"""What a machine says of itself within a second: versions, code, clock. Imports no torch.

``python -m vembed_ds.preflight.facts PORT`` prints it as one marked line, which others find behind
whatever a login prints.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import vembed_ds

MARK = "vembed-facts: "
_BOOT = Path("/proc/sys/kernel/random/boot_id")
PACKAGES = ("torch", "deepspeed", "transformers")  # must be alike on all machines of a run


def facts(port: int | None = None) -> dict[str, Any]:
    """Host, versions by name with a digest of this package's code, who listens on a port, time in seconds.

    ``machine`` is the same under every name of a machine, and on no two.
    """
    return {
        "host": platform.node(),
        "machine": f"{platform.node()} {_BOOT.read_text().strip() if _BOOT.is_file() else ''}",
        "versions": {
            "python": ".".join(platform.python_version_tuple()[:2]),
            **{name: installed_version(name) for name in PACKAGES},
            "vembed_ds": f"{vembed_ds.__version__} (code {code_digest()})",
        },
        "port_owner": None if port is None else port_owner(port),
        "time": time.time(),
    }


def installed_version(package: str) -> str:
    """``"none"`` where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def code_digest() -> str:
    """Eight characters that change with any module of this package."""
    folder = Path(vembed_ds.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def port_owner(port: int) -> str | None:
    """Who listens on a port of this machine, such as ``"python, pid 12"``; ``None``: it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as rank 0 will
        try:
            probe.bind(("", port))
            return None
        except OSError as error:
            reason = error.strerror or str(error)
    for connection in psutil.net_connections("tcp"):
        if connection.pid and connection.laddr and connection.laddr.port == port:
            return f"{psutil.Process(connection.pid).name()}, pid {connection.pid}"
    return reason


def parse_facts(text: str) -> dict[str, Any] | None:
    """What :func:`facts` gave, out of what a command printed; ``None``: it is not in there."""
    for line in text.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    return None


if __name__ == "__main__":
    sys.stdout.write(f"{MARK}{json.dumps(facts(int(sys.argv[1])))}\n")
