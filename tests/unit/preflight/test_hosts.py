"""Machines asked by ssh: a program of that name which answers as they would."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vembed_ds.errors import ConfigError
from vembed_ds.preflight import hosts
from vembed_ds.preflight.facts import MARK, facts, parse_facts
from vembed_ds.preflight.findings import Finding
from vembed_ds.preflight.hosts import ask_hosts, require_hosts, require_program

# The command is behind the host's name; what the machine lacks is really lacking, so that
# the messages are those of Python and the shell.
SSH = """\
#!/bin/bash
host=${{@: -2:1}} command=${{@: -1}}
echo "$@" >> {folder}/asked
case $host in
  good) echo "Welcome to $host"; exec sh -c "$command" ;;
  away) echo "ssh: connect to host away port 22: Connection timed out" >&2; exit 255 ;;
  bare) cd / && exec {python} -I -S -m vembed_ds.preflight.facts ;;
  empty) exec sh -c "${{command//{name}/no-such-python}}" ;;
  other-disk) exec sh -c "${{command/cd /cd /no-such-folder}}" ;;
  mute) exec sleep 60 ;;
  *) cat {folder}/$host ;;
esac
"""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[Finding]]]:
    """Ask hosts; the findings of each."""
    name = Path(sys.executable).name
    python = shlex.quote(sys.executable)
    (tmp_path / "ssh").write_text(SSH.format(folder=tmp_path, python=python, name=name))
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def run(*names: str, **flags: Any) -> dict[str, list[Finding]]:
        findings = ask_hosts(names, flags)
        return {name: [found for found in findings if found.host == name] for name in names}

    return run


def answer(folder: Path, host: str, **changes: Any) -> None:
    """Let a host say what this one would, but for the changes."""
    found = facts(0) | changes
    (folder / host).write_text(f"{MARK}{json.dumps(found)}\n")


def test_a_machine_like_this_one(ask: Callable[..., dict[str, list[Finding]]]) -> None:
    found = ask("good", master_port=1)["good"]
    assert [(one.check, one.state) for one in found] == [
        ("ssh", "ok"),
        ("versions", "ok"),
        ("clock", "ok"),
        ("port", "ok"),
    ]


@pytest.mark.parametrize(
    ("host", "check", "finding", "remedy"),
    [
        (
            "away",
            "ssh",
            "cannot be reached: ssh: connect to host away port 22: Connection timed",
            "ssh away host",
        ),
        ("bare", "package", "there has no vembed_ds: ", "install it there as here"),
        (
            "empty",
            "python",
            f"has no {sys.executable}: ",
            "install the environment at the same place",
        ),
        ("other-disk", "folder", "has no folder ", "share it, or copy it there"),
    ],
)
def test_what_is_missing_is_named(
    ask: Callable[..., dict[str, list[Finding]]], host: str, check: str, finding: str, remedy: str
) -> None:
    [found] = ask(host)[host]
    assert (found.check, found.state) == (check, "fail")
    assert finding in found.finding
    assert remedy in found.remedy


def test_other_versions_and_other_code(
    ask: Callable[..., dict[str, list[Finding]]], tmp_path: Path
) -> None:
    own = facts()["versions"]
    answer(tmp_path, "old", versions={**own, "torch": "2.7.0"})
    answer(tmp_path, "edited", versions={**own, "vembed_ds": "0.1.0 (code 00000000)"})
    found = ask("old", "edited")
    versions = {host: found[host][1] for host in found}
    assert versions["old"].state == versions["edited"].state == "fail"
    assert versions["old"].finding == f"other versions: torch 2.7.0 (here {own['torch']})"
    assert "vembed_ds 0.1.0 (code 00000000) (here" in versions["edited"].finding


def test_clock_and_port(ask: Callable[..., dict[str, list[Finding]]], tmp_path: Path) -> None:
    answer(tmp_path, "late", time=time.time() - 100, port_owner="python3, pid 7")
    found = {one.check: one for one in ask("late")["late"]}
    assert found["clock"].state == "warn"
    assert "s off this machine's" in found["clock"].finding
    assert found["port"].state == "fail"
    assert found["port"].finding == "MASTER_PORT=29500 is taken (python3, pid 7)"
    assert found["port"].remedy == "choose a free one by --master_port"


def test_one_machine_under_two_names(
    ask: Callable[..., dict[str, list[Finding]]], tmp_path: Path
) -> None:
    answer(tmp_path, "short")
    answer(tmp_path, "short.domain")
    answer(tmp_path, "other", machine="other 1")
    found = ask("short", "other", "short.domain", master_port=1)
    assert [
        (name, one.state) for name in found for one in found[name] if one.check == "machine"
    ] == [("short.domain", "warn")]
    assert found["short.domain"][-1].finding.startswith("is the same machine as short: ranks of")


def test_a_machine_that_says_nothing(
    ask: Callable[..., dict[str, list[Finding]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 0.5)
    [found] = ask("mute")["mute"]
    assert found.finding == "connected, but gave no answer within 0.5 s"


def test_ssh_never_asks_and_takes_the_port(
    ask: Callable[..., dict[str, list[Finding]]], tmp_path: Path
) -> None:
    ask("away", ssh_port=2222)
    assert "BatchMode=yes -o ConnectTimeout=10 -p 2222 away" in (tmp_path / "asked").read_text()


def test_a_launch_is_refused_with_all_problems(
    ask: Callable[..., dict[str, list[Finding]]],
) -> None:
    with pytest.raises(ConfigError) as error:
        require_hosts(["good", "away", "bare"], {"master_port": 1})
    assert [problem.partition(":")[0] for problem in error.value.problems] == [
        "away",
        "bare",
        "nothing was started; `vembed-ds doctor --hostfile ...` looks at more, --no_preflight at nothing",
    ]
    require_hosts(["good"], {"master_port": 1})


def test_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for launcher, program in (("PDSH", "pdsh"), ("openmpi", "mpirun")):
        with pytest.raises(ConfigError, match=f"there is no program `{program}` on this machine"):
            require_program({"launcher": launcher})
    [found, *_] = ask_hosts(["a"], {})
    assert found.finding == "no program `ssh` here"


def test_facts_behind_noise() -> None:
    assert parse_facts('hello\nvembed-facts: {"a": 1}\nbye') == {"a": 1}
    assert parse_facts("hello") is None
