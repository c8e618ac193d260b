"""The launcher's flags: ours are DeepSpeed's, and come through."""

from __future__ import annotations

import argparse
import importlib
from typing import Any
from unittest import mock

import pytest
from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import MPICHRunner

from vembed_ds.cli import COMMANDS
from vembed_ds.errors import ConfigError
from vembed_ds.launching.flags import FLAGS, OUR_OWN, add_flags, require_consistent, split, words

# Always given, of no use here, or positional.
LEFT_OUT = {"--module", "--no_python", "--autotuning", "-h", "--help"}


def parser_of_deepspeed() -> argparse.ArgumentParser:
    with mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True) as parse:
        runner.parse_args([])
    parser: argparse.ArgumentParser = parse.call_args[0][0]
    return parser


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


def test_they_are_those_of_the_installed_deepspeed() -> None:
    theirs = options(parser_of_deepspeed())
    ours = {name: flag for flag in FLAGS if flag.key not in OUR_OWN for name in flag.names}
    assert ours.keys() == theirs.keys() - LEFT_OUT
    for name, flag in ours.items():
        assert (theirs[name].nargs == 0) == (flag.kind is None), name
        assert theirs[name].dest == flag.key, name
        assert flag.kind in (None, theirs[name].type), name


def test_deepspeed_reads_what_was_split_off() -> None:
    words_typed = [
        *("--config", "a.yaml", "-H", "hosts", "--num_accelerators", "4", "lr=1", "--no_ssh", "-m"),
        *("--launcher_args=-x 1", "--config_override", "b c", "--no_preflight", "--resume=auto"),
    ]
    flags, rest = split(words_typed, prog="p")
    assert rest == ["--config", "a.yaml", "lr=1", "--config_override", "b c", "--resume=auto"]
    read = runner.parse_args([*words(flags), "--module", "vembed_ds.train", *rest])
    assert (read.hostfile, read.num_gpus, read.no_ssh) == ("hosts", 4, True)
    assert (read.launcher_args, read.user_args) == ("-x 1", rest)


def test_no_command_on_ranks_has_a_flag_of_the_launcher() -> None:
    launcher = argparse.ArgumentParser(add_help=False)
    add_flags(launcher)
    for name, command in COMMANDS.items():
        if not command.on_ranks:
            continue
        try:
            module = importlib.import_module(f"vembed_ds.{name.replace('-', '_')}")
        except ModuleNotFoundError:
            continue  # tests/unit/test_cli.py says which may be missing
        assert not options(module.build_parser()).keys() & options(launcher).keys(), name


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"num_gpus": 0}, "--num_gpus=0: must be at least 1"),
        ({"include": "a", "exclude": "b"}, "--exclude and --include: give one of the two"),
        ({"include": "a", "num_gpus": 2}, "--num_gpus and --include: give one of the two"),
        ({"master_port": 65536}, "--master_port=65536: must be at most 65535"),
        ({"launcher": "slrm"}, "--launcher=slrm: must be one of pdsh, openmpi, impi"),
        ({"launcher": "SLURM"}, "DeepSpeed's own start by it leaves --module out: write `srun"),
        (
            {"launcher": "mpich"},
            "start by it runs its helper by --module, which fails: write `mpie",
        ),
        ({"launcher": "impi", "include": "a"}, "--include=a: not with --launcher=impi, which star"),
        ({"launcher": "openmpi", "num_gpus": 2}, "--num_gpus=2: not with --launcher=openmpi, whi"),
        ({"node_rank": 1}, "--node_rank=1: only with --no_ssh; else leave it out"),
        ({"no_ssh": True, "hostfile": "h", "node_rank": 0}, "--no_ssh: also give --master_addr, a"),
    ],
)
def test_what_does_not_go_together_is_refused(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        require_consistent(flags)
    assert sentence in str(error.value)


def test_deepspeeds_start_by_mpich_still_runs_a_file_as_a_module() -> None:
    """Once this fails, mpich may be one of the launchers."""
    arguments = runner.parse_args(["--launcher", "mpich", "--module", "m"])
    command = MPICHRunner(arguments, "", {"a": 1, "b": 1}).get_cmd({}, {"a": [0], "b": [0]})
    assert command[command.index("-m") + 1].endswith("/launcher_helper.py")


def test_all_problems_come_together() -> None:
    with pytest.raises(ConfigError) as error:
        require_consistent({"num_gpus": 0, "master_port": 0, "no_ssh": True})
    assert len(error.value.problems) == 5
    require_consistent({"num_gpus": 2, "hostfile": "h", "launcher": "PDSH"})
