"""What reaches other machines."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import PDSHRunner

from vembed_ds.errors import ConfigError
from vembed_ds.launching.remote import exported, pdsh_word, write_environment

WORDS = [
    "plain",
    "a b",
    "",
    "column_mapping={query: a, positive: 'b c'}",
    "100%n %h",
    "%",
    "$HOME",
    "$HOME and `id`",
    "a;b&c|d>e",
    "*",
    "it's",
    'say "x" twice',
    'back\\slash "and \\" blank',
    "back\\slash",
    "(1,2)",
    "ünï",
]


def test_every_word_comes_through_pdsh_and_the_shell_as_it_is() -> None:
    arguments = runner.parse_args(["--module", "m", *map(pdsh_word, WORDS)])
    command, _, _ = PDSHRunner(arguments, "").get_cmd({}, {"a": [0]})
    sent = command[command.index("m") + 1 :]
    # pdsh joins its words by blanks, puts the host's number for %n, and % for %%.
    line = " ".join(sent).replace("%%", "\0").replace("%n", "0").replace("%h", "a")
    line = line.replace("\0", "%")
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True, text=True
    )
    assert printed.stdout.split("\0")[:-1] == WORDS


def test_variables_that_a_run_needs_are_passed_on_and_no_keys(tmp_path: Path) -> None:
    environment = {
        "HF_HUB_OFFLINE": "1",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HF_TOKEN": "secret",
        "WANDB_API_KEY": "secret",
        "PATH": "/bin",
    }
    found = exported(environment, [tmp_path])
    assert found == {"HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0"}


def test_the_users_files_win_and_deepspeed_reads_the_result(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=1\n\nB=x=y\n"), (here, "B=2\nNCCL_DEBUG=WARN\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    found = exported({"NCCL_DEBUG": "INFO"}, [home, here])
    assert found == {"NCCL_DEBUG": "WARN", "A": "1", "B": "2"}
    assert exported({"DS_ENV_FILE": "other"}, [home, here]) == {}
    write_environment(tmp_path / "file", found)
    lines = (tmp_path / "file").read_text().splitlines()
    assert dict(line.split("=", maxsplit=1) for line in lines) == found  # as the launcher does


def test_a_line_that_is_no_variable_is_named(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport B=2\n")
    with pytest.raises(ConfigError, match="line 2: 'export B=2': must be NAME=VALUE"):
        exported({}, [tmp_path])
