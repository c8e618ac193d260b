"""Host files, and what is left of them: the same as DeepSpeed leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher import runner

from vembed_ds.errors import ConfigError
from vembed_ds.launching.hostfile import hostfile_of, read_hostfile, used_hosts

HOSTS = {"a": 4, "b": 2, "c": 4}


def write(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_lines_comments_and_blanks(tmp_path: Path) -> None:
    text = "# the cluster\nnode1  slots=8\n\n  node2 slots=4 # half of it\n"
    assert read_hostfile(write(tmp_path, text)) == {"node1": 8, "node2": 4}
    assert dict(runner._parse_hostfile(text.splitlines())) == {"node1": 8, "node2": 4}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("node1\n", "line 1: 'node1': must be `HOST slots=RANKS`, such as `node1 slots=8`"),
        ("a slots=1\nb slots=0\n", "line 2: 'b slots=0': must be `HOST slots=RANKS`"),
        ("a slots=1\na slots=2\n", "line 2: a comes twice; give it one line"),
        ("# nothing\n", "names no host; give a line `HOST slots=RANKS` per machine"),
        ("a slots=8x\n", "line 1: 'a slots=8x': must be `HOST slots=RANKS`"),
        ("a slots=8,4\n", "line 1: 'a slots=8,4': must be `HOST slots=RANKS`"),
        ("-oProxyCommand=x slots=8\n", "line 1: '-oProxyCommand=x slots=8': must be"),
        ("\ufeffa slots=8\n", "line 1: '\\ufeffa slots=8': must be"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_hostfile(write(tmp_path, text))
    assert sentence in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"a slots=1\n\xff slots=1\n")
    with pytest.raises(ConfigError, match=r"hosts: byte 10 is not UTF-8; save it as plain text"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); correct its rights"):
        read_hostfile(tmp_path)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; give one with a line"):
        hostfile_of({"hostfile": str(tmp_path / "hosts")})
    assert hostfile_of({}) is None


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"include": "b@c:0,3"},
        {"exclude": "b@a:1"},
        {"exclude": "b:0,1"},
        {"num_nodes": 2},
        {"num_gpus": 3},
        {"num_nodes": 1, "num_gpus": 1},
    ],
    ids=str,
)
def test_deepspeed_starts_on_the_same(flags: dict[str, Any]) -> None:
    chosen = runner.parse_inclusion_exclusion(
        HOSTS, flags.get("include", ""), flags.get("exclude", "")
    )
    chosen = runner.apply_num_nodes_and_gpus(
        chosen, flags.get("num_nodes", -1), flags.get("num_gpus", -1)
    )
    theirs = [(host, len(devices)) for host, devices in chosen.items()]
    assert list(used_hosts(HOSTS, flags).items()) == theirs


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"include": "d"}, "--include=d: 'd' is not in the host file; it has a, b, c"),
        ({"exclude": "b:2"}, "--exclude=b:2: b has no device 2; it has 0 to 1"),
        ({"include": "b:x"}, "--include=b:x: b has no device x; it has 0 to 1"),
        ({"exclude": "a@b@c"}, "--exclude=a@b@c: leaves no device to start on"),
        ({"num_nodes": 4}, "--num_nodes=4: the host file has 3; give it more lines"),
    ],
)
def test_what_the_file_does_not_have_is_named(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        used_hosts(HOSTS, flags)
    assert sentence in str(error.value)
