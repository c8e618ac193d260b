"""``vembed-ds COMMAND``: every command, and the launcher for those that run on ranks."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import vembed_ds
from vembed_ds.command import EXIT_CODES, EXIT_ERROR
from vembed_ds.distributed.announced import other_launcher
from vembed_ds.errors import ConfigError, VembedError
from vembed_ds.launching.flags import add_flags, split
from vembed_ds.launching.hostfile import hostfile_of
from vembed_ds.launching.target import local_devices, target_of


class Command(NamedTuple):
    """A command module of this package, and whether it runs on ranks."""

    meaning: str
    on_ranks: bool = False  # without flags of the launcher: on all accelerators of this machine


COMMANDS = {
    "train": Command("train a model", on_ranks=True),
    "evaluate": Command("measure the retrieval of a model", on_ranks=True),
    "encode": Command("embed a data set into files", on_ranks=True),
    "mine": Command("find hard negatives for a data set", on_ranks=True),
    "precompute-teacher": Command("fill the tables of a run's cached teachers", on_ranks=True),
    "convert": Command("make a checkpoint a plain Hugging Face folder"),
    "validate": Command("read every record of the data, and say what is wrong with it"),
    "plan": Command("say what a run takes, whether it fits, and which settings to take"),
    "doctor": Command("look at machines, network and folders before a run"),
}
EXAMPLES = """\
examples:
  vembed-ds train --ds_config ds_configs/zero2.json --config my.yaml              all accelerators of this machine
  vembed-ds train --num_gpus 4 --ds_config ds_configs/zero2.json --config my.yaml       four of them, or 4 CPU ranks
  vembed-ds train --hostfile hosts --ds_config ds_configs/zero3.json --config my.yaml   the machines in `hosts`
  srun vembed-ds train --ds_config ds_configs/zero3.json --config my.yaml               a rank per task, so does mpirun
  torchrun --nproc_per_node 8 --module vembed_ds train --ds_config ... --config ...     a rank per process
  vembed-ds doctor --hostfile hosts                                               look first
`vembed-ds COMMAND --help` says more. What deepspeed takes may be written as there:
`vembed-ds --num_gpus 8 -m vembed_ds.train ...`

"""
_CPU_NOTICE = "no accelerator here: one rank on this machine's CPU cores; --num_gpus N starts N"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, here or on ranks; returns the exit code."""
    logging.basicConfig(format="vembed-ds: %(message)s")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(words or ["--help"])
    try:
        return _run(arguments)
    except VembedError as error:
        text = str(error).replace("\n", "\n  ")
        sys.stderr.write(f"vembed-ds: {type(error).__name__}: {text}\n")
        return EXIT_ERROR


def build_parser() -> argparse.ArgumentParser:
    """The command line up to the command's own arguments."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.meaning}" for name, command in COMMANDS.items()]
    ranks = ", ".join(name for name, command in COMMANDS.items() if command.on_ranks)
    parser = argparse.ArgumentParser(
        prog="vembed-ds",
        usage="vembed-ds COMMAND [flags of the launcher] [arguments of the command]",
        description="Train, convert and use embedding models on DeepSpeed.\n\ncommands:\n"
        + "\n".join(lines)
        + f"\n\nOn ranks run {ranks}.",
        epilog=EXAMPLES + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vembed-ds {vembed_ds.__version__}")
    add_flags(parser)
    # `deepspeed --module vembed_ds COMMAND` puts it before the command; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("command", metavar="COMMAND", help="see below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    flags = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("command", "rest", "module", "local_rank")
    }
    name = _command_name(arguments.command)
    command, rest = COMMANDS[name], list(arguments.rest)
    if command.on_ranks:
        found, rest = split(rest, prog=f"vembed-ds {name}")
        flags |= found
    elif flags:
        raise ConfigError(f"--{next(iter(flags))}: does not belong before {name}; leave it out")
    module = _module(name)
    if not command.on_ranks:
        return int(module.main(rest))
    if {"-h", "--help"} & set(rest):
        return _help(module)
    if _is_launch(flags):
        module.build_parser().parse_args(rest)  # a mistake is one message, not one of every rank
        return _launch(module.__name__, rest, flags)
    return int(module.main(rest))


def _command_name(word: str) -> str:
    """Of ``train``, ``vembed_ds.train`` or ``precompute_teacher`` the name in the table."""
    name = word.removeprefix("vembed_ds.").replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"{word}: no command of vembed-ds; {meant}")
    return name


def _module(name: str) -> ModuleType:
    module = f"vembed_ds.{name.replace('-', '_')}"
    if find_spec(module) is None:
        raise ConfigError(
            f"{name}: this installation ({vembed_ds.__version__}) has no module {module}; install a "
            "version that has it"
        )
    return importlib.import_module(module)


def _help(module: ModuleType) -> int:
    """The command's own help, then the launcher's flags."""
    module.build_parser().print_help()
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    add_flags(parser)
    sys.stdout.write("\n" + parser.format_help())
    return 0


def _is_launch(flags: Mapping[str, Any]) -> bool:
    """Whether ranks are to be started, instead of being one or running in this process.

    Raises:
        ConfigError: This is a rank already, and is told to start some.
    """
    if "RANK" in os.environ:
        if flags:
            raise ConfigError(
                f"--{next(iter(flags))}: another launcher has started this process as rank "
                f"{os.environ['RANK']}; leave the flag out, or that launcher"
            )
        return False
    if flags:
        return True
    if other_launcher(os.environ) is not None:
        return False
    if hostfile_of({}) is not None:
        return True
    devices = local_devices()
    if devices == 0:
        sys.stderr.write(f"vembed-ds: {_CPU_NOTICE}\n")
    return devices > 1


def _launch(module: str, arguments: Sequence[str], flags: Mapping[str, Any]) -> int:
    """Look at flags and machines, then start."""
    from vembed_ds.launching.start import launch

    target = target_of(flags)
    if target.by_ssh and "no_preflight" not in flags:
        from vembed_ds.preflight.hosts import require_hosts, require_program

        require_program(flags)
        require_hosts(list(target.hosts), flags)
    return launch(module, arguments, flags=target.flags, by_ssh=target.by_ssh)


if __name__ == "__main__":
    sys.exit(main())
