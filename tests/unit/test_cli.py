"""``vembed-ds``: its commands, and whether it starts ranks, is one, or runs in this process."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import vembed_ds
from vembed_ds import cli
from vembed_ds.launching import start

READ_ONLY = ["plan", "doctor"]  # the others can say what they would write
RANKS = ["train", "evaluate", "encode", "mine", "precompute-teacher"]
STARTED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
TRAIN = ["--ds_config", "d.json", "--config", "c.yaml"]


class Calls:
    """What was run in this process, and what was launched."""

    def __init__(self) -> None:
        self.here: list[list[str]] = []
        self.launched: list[tuple[str, list[str], dict[str, Any], bool]] = []

    def main(self, words: Sequence[str]) -> int:
        self.here.append(list(words))
        return 7

    def launch(
        self, module: str, words: Sequence[str], *, flags: dict[str, Any], by_ssh: bool
    ) -> int:
        self.launched.append((module, list(words), dict(flags), by_ssh))
        return 75


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    from vembed_ds import train

    found = Calls()
    monkeypatch.setattr(train, "main", found.main)
    monkeypatch.setattr(start, "launch", found.launch)
    monkeypatch.setattr(cli, "local_devices", lambda: 0)
    for name in (*STARTED, *SRUN):
        monkeypatch.delenv(name, raising=False)
    return found


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = (
        "import sys; from vembed_ds.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert command.meaning in done.stdout
    assert "exit codes:" in done.stdout
    assert "examples:" in done.stdout


def test_as_a_module_and_its_version() -> None:
    words = [sys.executable, "-m", "vembed_ds", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"vembed-ds {vembed_ds.__version__}\n"


def test_every_command_module_is_in_the_table() -> None:
    folder = Path(vembed_ds.__file__).parent
    mains = {path.stem for path in folder.glob("*.py") if "\ndef main(" in path.read_text()}
    assert mains - {"cli"} <= {name.replace("-", "_") for name in cli.COMMANDS}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_examples_and_exit_codes(name: str) -> None:
    parser = cli._module(name).build_parser()
    said = parser.format_help()
    assert said.startswith(f"usage: vembed-ds {name} ")
    assert re.search(rf"^examples:\n  vembed-ds {name}\b", said, re.MULTILINE)
    assert re.search(r"^exit codes?:\s+0\s+\w", said, re.MULTILINE)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert ("--dry_run" in parser._option_string_actions) == (name not in READ_ONLY)


def test_a_module_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["mine"]) == 2
    said = capsys.readouterr().err
    assert "mine: this installation" in said
    assert "has no module vembed_ds.mine; install a version that has it" in said


def test_a_mistyped_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "trian: no command of vembed-ds; did you mean train?" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2
    assert "there are train, evaluate, encode" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--num_gpus", "2", *TRAIN],
        ["train", *TRAIN, "--num_accelerators=2"],
        ["--num_gpus", "2", "train", *TRAIN],
        ["--num_gpus", "2", "-m", "vembed_ds.train", *TRAIN],
        ["--num_gpus", "2", "--module", "vembed_ds.train", *TRAIN],
        ["train", "-m", "--num_gpus", "2", *TRAIN],
    ],
    ids=" ".join,
)
def test_flags_of_the_launcher_launch(calls: Calls, words: list[str]) -> None:
    assert cli.main(words) == 75
    [(module, arguments, flags, by_ssh)] = calls.launched
    assert (module, arguments, flags["num_gpus"], by_ssh) == ("vembed_ds.train", TRAIN, 2, False)


def test_without_flags_all_accelerators_are_used(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "local_devices", lambda: 4)
    assert cli.main(["train", *TRAIN]) == 75
    [(_, arguments, flags, _)] = calls.launched
    # The launcher counts itself: told a number, it would ignore CUDA_VISIBLE_DEVICES.
    assert (arguments, flags.keys()) == (TRAIN, {"master_port"})


@pytest.mark.parametrize(("devices", "said"), [(0, "no accelerator here: one rank"), (1, "")])
def test_one_rank_needs_no_launcher(
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    devices: int,
    said: str,
) -> None:
    monkeypatch.setattr(cli, "local_devices", lambda: devices)
    assert cli.main(["train", *TRAIN]) == 7
    assert (calls.here, calls.launched) == ([TRAIN], [])
    error = capsys.readouterr().err
    assert said in error
    assert bool(error) == bool(said)


@pytest.mark.parametrize(
    ("environment", "words"),
    [(STARTED, []), (STARTED, ["--local_rank=3"]), (SRUN, [])],
    ids=["torchrun", "deepspeed", "srun"],
)
def test_under_another_launcher_it_is_the_rank(
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    words: list[str],
) -> None:
    monkeypatch.setattr(cli, "local_devices", lambda: 4)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*words, "train", *TRAIN]) == 7
    assert (calls.here, calls.launched) == ([TRAIN], [])


def test_srun_may_start_a_launcher_on_every_machine(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--num_gpus", "2", *TRAIN]) == 75


def test_a_rank_starts_no_ranks(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in STARTED.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--num_gpus", "2", *TRAIN]) == 2
    assert (
        "--num_gpus: another launcher has started this process as rank 3" in capsys.readouterr().err
    )
    assert calls.launched == []


def test_a_mistake_in_the_arguments_is_told_before_ranks_start(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--num_gpus", "2", *TRAIN, "--resmue", "auto"])
    assert "unrecognized arguments: --resmue auto" in capsys.readouterr().err
    assert calls.launched == []


def test_machines_are_looked_at_first_unless_it_is_switched_off(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vembed_ds.preflight import hosts

    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    world = ["train", "--hostfile", str(tmp_path / "hosts"), *TRAIN]
    asked: Callable[..., None] = mock.Mock()
    monkeypatch.setattr(hosts, "require_hosts", asked)
    monkeypatch.setattr(hosts, "require_program", asked)
    assert cli.main(world) == 75
    assert asked.mock_calls[1].args[0] == ["a", "b"]  # type: ignore[attr-defined]
    assert cli.main([*world, "--no_preflight"]) == 75
    assert len(asked.mock_calls) == 2  # type: ignore[attr-defined]
    assert [by_ssh for *_, by_ssh in calls.launched] == [True, True]


def test_plain_commands_get_their_arguments_and_no_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.SimpleNamespace(main=mock.Mock(return_value=0))
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    assert cli.main(["convert", "--num_gpus", "2", "x"]) == 0
    module.main.assert_called_once_with(["--num_gpus", "2", "x"])
    assert cli.main(["--num_gpus", "2", "convert", "x"]) == 2
    assert "--num_gpus: does not belong before convert; leave it out" in capsys.readouterr().err


def test_help_of_a_command_on_ranks_has_the_launchers_flags(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--num_gpus", "2", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--allow_change" in said
    assert "--hostfile" in said
    assert calls.launched == []


def test_which_commands_run_on_ranks() -> None:
    assert [name for name, command in cli.COMMANDS.items() if command.on_ranks] == RANKS
    there = [name for name in cli.COMMANDS if find_spec(f"vembed_ds.{name.replace('-', '_')}")]
    assert {"train", "evaluate", "precompute-teacher", "convert", "doctor"} <= set(there)
