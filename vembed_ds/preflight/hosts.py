"""Other machines asked by ssh, as the launcher will reach them: do they answer, are they alike.

The command there is run as DeepSpeed runs its own: in the folder of the same name, with the same
interpreter and the same ``PYTHON*`` variables.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vembed_ds.distributed.announced import DEFAULT_PORT
from vembed_ds.errors import ConfigError
from vembed_ds.preflight.facts import facts, parse_facts
from vembed_ds.preflight.findings import FAIL, OK, WARN, Finding, failed

CONNECT_SECONDS = 10
ANSWER_SECONDS = 60
CLOCK_SECONDS = 5.0  # logs and file times of machines that differ by more are hard to read
_SSH_FAILED = 255
_NOT_FOUND = 127
_NO_FOLDER = 91  # exit code of our own for a `cd` that fails


class Answer(NamedTuple):
    """What a host said: facts, or why there are none; ``seconds``: how its clock differs."""

    host: str
    facts: dict[str, Any] | None
    finding: Finding
    seconds: float = 0.0


def ask_hosts(hosts: Sequence[str], flags: Mapping[str, Any]) -> list[Finding]:
    """Whether every host can be reached, has this package, and is like this machine.

    Args:
        hosts: Names as in the host file.
        flags: Of the launcher: ``ssh_port`` and ``venv_script`` count.
    """
    command = _command(flags)
    with ThreadPoolExecutor(max_workers=64) as pool:
        answers = list(pool.map(lambda host: _ask(host, command, flags), hosts))
    findings = [answer.finding for answer in answers]
    own = facts()["versions"]
    for answer in answers:
        if answer.facts is not None:
            findings.append(_versions(answer.host, answer.facts["versions"], own=own))
            findings.append(_clock(answer.host, answer.seconds))
    findings += _twice(answers)
    first = answers[0]
    if first.facts is not None and "master_addr" not in flags:  # rank 0's machine
        owner = first.facts["port_owner"]
        findings.append(
            port_finding(flags.get("master_port", DEFAULT_PORT), owner, host=first.host)
        )
    return findings


def port_finding(port: int, owner: str | None, *, host: str = "") -> Finding:
    """Whether rank 0 can wait for the others at ``port`` of its machine."""
    if owner is None:
        return Finding("port", f"{port} is free", OK, "", host)
    finding = f"MASTER_PORT={port} is taken ({owner})"
    return Finding("port", finding, FAIL, "choose a free one by --master_port", host)


def require_hosts(hosts: Sequence[str], flags: Mapping[str, Any]) -> None:
    """Refuse to start where :func:`ask_hosts` finds a failure.

    Raises:
        ConfigError: With the problems of all hosts.
    """
    findings = ask_hosts(hosts, flags)
    if failed(findings):
        raise ConfigError(
            [
                f"{finding.host}: {finding.finding}; {finding.remedy}"
                for finding in findings
                if finding.state == FAIL
            ]
            + [
                "nothing was started; `vembed-ds doctor --hostfile ...` looks at more, --no_preflight at nothing"
            ]
        )


def require_program(flags: Mapping[str, Any]) -> None:
    """Refuse to start where the program that reaches other machines is missing.

    Raises:
        ConfigError: It is.
    """
    launcher = flags.get("launcher", "pdsh").lower()
    program = "pdsh" if launcher == "pdsh" else "mpirun"
    if shutil.which(program) is None:
        raise ConfigError(
            f"--launcher={launcher}: there is no program `{program}` on this machine; install it (Debian: "
            f"apt-get install {'pdsh' if program == 'pdsh' else 'openmpi-bin'}), or start on every machine "
            "yourself: --no_ssh (launch/ssh.sh), srun, torchrun"
        )


def ssh_command(host: str, command: str, flags: Mapping[str, Any]) -> list[str]:
    """Words that run ``command`` in a shell of ``host``, and never ask for a password."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    port = ["-p", str(flags["ssh_port"])] if "ssh_port" in flags else []
    return ["ssh", *options, *port, host, command]


def _command(flags: Mapping[str, Any]) -> str:
    folder = Path.cwd()
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    parts = [f"cd {shlex.quote(str(folder))} || exit {_NO_FOLDER}"]
    if "venv_script" in flags:
        parts.append(f"source {shlex.quote(flags['venv_script'])}")
    python = f"PYTHONPATH={shlex.quote(path)} {shlex.quote(sys.executable)}"
    port = flags.get("master_port", DEFAULT_PORT)
    parts.append(f"{python} -m vembed_ds.preflight.facts {port}")
    return "; ".join(parts)


def _ask(host: str, command: str, flags: Mapping[str, Any]) -> Answer:
    started = time.time()
    try:
        done = subprocess.run(
            ssh_command(host, command, flags),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        remedy = "install an ssh client, or start on every machine yourself with --no_ssh"
        return Answer(host, None, Finding("ssh", "no program `ssh` here", FAIL, remedy, host))
    except subprocess.TimeoutExpired:
        remedy = "look at its load and its file servers"
        finding = f"connected, but gave no answer within {ANSWER_SECONDS} s"
        return Answer(host, None, Finding("ssh", finding, FAIL, remedy, host))
    found = parse_facts(done.stdout) if done.returncode == 0 else None
    if found is None:
        return Answer(host, None, _no_facts(host, done))
    # Its clock was read between these two.
    off = max(started - found["time"], found["time"] - time.time(), 0.0)
    return Answer(host, found, Finding("ssh", f"answers as {found['host']}", OK, "", host), off)


def _no_facts(host: str, done: subprocess.CompletedProcess[str]) -> Finding:
    """Why a host gave no facts, by how the command there ended."""
    said = done.stderr.strip().splitlines()
    last = said[-1].strip() if said else f"exit code {done.returncode}"
    if done.returncode == _SSH_FAILED:
        return Finding(
            "ssh",
            f"cannot be reached: {last}",
            FAIL,
            f"try `ssh {host} hostname`, which must ask for no password (name, key, firewall, sshd)",
            host,
        )
    if done.returncode == _NO_FOLDER:
        return Finding(
            "folder",
            f"has no folder {Path.cwd()}",
            FAIL,
            "ranks start in the folder of the same name: share it, or copy it there",
            host,
        )
    if done.returncode == _NOT_FOUND:
        return Finding(
            "python",
            f"has no {sys.executable}: {last}",
            FAIL,
            "install the environment at the same place there, or share it",
            host,
        )
    if "No module named" in last and "vembed_ds" in last:
        return Finding(
            "package",
            f"{sys.executable} there has no vembed_ds: {last}",
            FAIL,
            "install it there as here (pip install vembed-ds, of one version)",
            host,
        )
    return Finding("package", f"cannot say its versions: {last}", FAIL, "mend that first", host)


def _versions(host: str, versions: Mapping[str, str], *, own: Mapping[str, str]) -> Finding:
    differing = [
        f"{name} {versions.get(name)} (here {wanted})"
        for name, wanted in own.items()
        if versions.get(name) != wanted
    ]
    if differing:
        remedy = "install the same everywhere (constraints.txt), and copy the same code"
        return Finding("versions", f"other versions: {', '.join(differing)}", FAIL, remedy, host)
    return Finding("versions", "as here", OK, "", host)


def _twice(answers: Sequence[Answer]) -> list[Finding]:
    """Names behind which there is a machine that was named before."""
    findings = []
    names: dict[str, str] = {}
    for answer in answers:
        machine = None if answer.facts is None else answer.facts.get("machine")
        first = answer.host if machine is None else names.setdefault(machine, answer.host)
        if first != answer.host:
            finding = f"is the same machine as {first}: ranks of both would use its first devices"
            remedy = "give it one line in the host file, with all its slots"
            findings.append(Finding("machine", finding, WARN, remedy, answer.host))
    return findings


def _clock(host: str, seconds: float) -> Finding:
    if seconds > CLOCK_SECONDS:
        finding = f"{seconds:.0f} s off this machine's"
        return Finding("clock", finding, WARN, "set it by NTP (chrony, systemd-timesyncd)", host)
    return Finding("clock", f"within {max(seconds, 1):.0f} s of this machine's", OK, "", host)
