"""What reaches other machines."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import PDSHRunner

from vembed_ds.errors import ConfigError
from vembed_ds.launching.remote import (
    exported,
    pdsh_word,
    require_plain,
    without_secrets,
    write_environment,
)

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
    assert printed_there(f"printf '%s\\0' {as_pdsh(sent)}") == WORDS


def as_pdsh(sent: Sequence[str]) -> str:
    """It joins its words by blanks, puts the host's number for %n, and % for %%."""
    line = " ".join(sent).replace("%%", "\0").replace("%n", "0").replace("%h", "a")
    return line.replace("\0", "%")


def printed_there(line: str) -> list[str]:
    printed = subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True)
    return printed.stdout.split("\0")[:-1]


def test_every_value_of_the_environment_comes_through_too(tmp_path: Path) -> None:
    values = [word for word in WORDS if word == word.strip()]
    names = [f"VEMBED_{number}" for number in range(len(values))]
    variables = exported(dict(zip(names, values, strict=True)), [], by_pdsh=True)
    write_environment(tmp_path / "file", variables)
    runner_ = PDSHRunner(runner.parse_args(["--module", "m"]), "")
    for line in (tmp_path / "file").read_text().splitlines():  # as the launcher does
        runner_.add_export(*line.split("=", maxsplit=1))
    command, _, _ = runner_.get_cmd({}, {"a": [0]})
    (exports,) = [word for word in command if word.startswith("export ")]
    there = " ".join(f'"${name}"' for name in names)
    assert printed_there(f"{as_pdsh([exports])} printf '%s\\0' {there}") == values


def test_no_launcher_writes_passwords_of_mlflow_into_command_lines() -> None:
    kept = {"MLFLOW_TRACKING_URI": "http://a", "WANDB_API_KEY": "x", "PATH": "/bin"}
    secrets = {"MLFLOW_TRACKING_PASSWORD": "x", "MLFLOW_TRACKING_TOKEN": "x"}
    assert without_secrets(kept | secrets) == kept


@pytest.mark.parametrize("path", ["/a b", "/a$b", "/100%", "/it's", "/a;b"])
def test_folders_that_do_not_come_through_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"folder .* does not come through pdsh; use one of lett"):
        require_plain(folder=Path(path), interpreter="/usr/bin/python3.11")
    require_plain(folder=Path("/a_b-c.d/ü+1@x"))


def test_variables_that_a_run_needs_are_passed_on_and_no_keys(tmp_path: Path) -> None:
    environment = {
        "HF_HUB_OFFLINE": "1",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HF_TOKEN": "secret",
        "WANDB_API_KEY": "secret",
        "PATH": "/bin",
    }
    found = exported(environment, [tmp_path], by_pdsh=True)
    assert found == {"HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0"}


def test_the_users_files_win_and_deepspeed_reads_the_result(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=1\n\nB=x=y\n"), (here, "B=2\nNCCL_DEBUG=WARN\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    found = exported({"NCCL_DEBUG": "INFO"}, [home, here], by_pdsh=True)
    assert found == {"NCCL_DEBUG": "WARN", "A": "1", "B": "2"}
    assert exported({"DS_ENV_FILE": "other"}, [home, here], by_pdsh=True) == {}
    write_environment(tmp_path / "file", found)
    lines = (tmp_path / "file").read_text().splitlines()
    assert dict(line.split("=", maxsplit=1) for line in lines) == found  # as the launcher does


def test_a_line_that_is_no_variable_is_named(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport B=2\n")
    with pytest.raises(ConfigError, match="line 2: 'export B=2': must be NAME=VALUE"):
        exported({}, [tmp_path], by_pdsh=True)
