"""The DeepSpeed launcher's flags, taken out of a command line and put together again.

The list is our own, because the launcher's parser cannot be had without the seconds that importing
DeepSpeed takes; a test compares the two.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vembed_ds.distributed.announced import DEFAULT_PORT
from vembed_ds.errors import ConfigError


class Flag(NamedTuple):
    """One flag: its names, the first of which is passed on, what it takes, what it means."""

    names: tuple[str, ...]
    kind: type[int] | type[str] | None  # None: it takes nothing
    meaning: str

    @property
    def key(self) -> str:
        """Its name in a mapping."""
        return self.names[0].lstrip("-")


FLAGS = (
    Flag(("--num_gpus", "--num_accelerators"), int, "ranks on each machine; also on CPUs"),
    Flag(("--hostfile", "-H"), str, "file of lines `HOST slots=RANKS`: start on these machines"),
    Flag(("--num_nodes",), int, "use the first so many of its machines"),
    Flag(("--include", "-i"), str, "use only these, as `a@b:0,2`: all of a, devices 0 and 2 of b"),
    Flag(("--exclude", "-e"), str, "use all but these"),
    Flag(("--master_addr",), str, "address of rank 0's machine; default: `hostname -I` there"),
    Flag(("--master_port",), int, f"port on that machine; default: {DEFAULT_PORT}"),
    Flag(
        ("--no_ssh",), None, "start this machine's ranks only; the same command runs on all others"
    ),
    Flag(("--node_rank",), int, "with --no_ssh: the number of this machine, from 0"),
    Flag(("--launcher",), str, "how other machines are reached: pdsh (default), openmpi, impi"),
    Flag(("--launcher_args",), str, "flags of pdsh or mpirun, as one word"),
    Flag(("--ssh_port",), int, "port of the machines' sshd"),
    Flag(("--no_ssh_check",), None, "do not let DeepSpeed try ssh first"),
    Flag(("--force_multi",), None, "reach the machine by ssh, though it is only one"),
    Flag(("--venv_script",), str, "script that activates the environment on the machines"),
    Flag(("--bind_cores_to_rank",), None, "cores of its own for every rank (numactl)"),
    Flag(("--bind_core_list",), str, "the cores to share out, as 0-15,32"),
    Flag(("--enable_each_rank_log",), str, "folder for a log file per rank"),
    Flag(("--save_pid",), None, "write the launcher's process number to /tmp"),
    Flag(("--no_local_rank",), None, "(always so: ranks read LOCAL_RANK)"),
    Flag(("--log_level",), str, "of the launcher; default: error"),
    Flag(("--quiet", "-q"), None, "errors of the launcher only"),
    Flag(("--no_preflight",), None, "do not look at the machines before starting (ours)"),
)
OUR_OWN = ("no_preflight",)
LAUNCHERS = ("pdsh", "openmpi", "impi")
_HIGHEST_PORT = 65535
# What DeepSpeed's own start by another program makes of `--module`, which all commands here need.
_WITHOUT_MODULE = {
    "slurm": "leaves --module out: write `srun vembed-ds ...` yourself (launch/slurm.sbatch)",
    "mpich": "runs its helper by --module, which fails: write `mpiexec ... vembed-ds ...` yourself",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Let ``parser`` know every flag; what is not given stays out of its result."""
    group = parser.add_argument_group("flags of the launcher")
    for flag in FLAGS:
        names = sorted(flag.names, key=len)
        if flag.kind is None:
            group.add_argument(*names, dest=flag.key, action="store_true", help=flag.meaning)
        else:
            metavar = "N" if flag.kind is int else "TEXT"
            group.add_argument(
                *names, dest=flag.key, type=flag.kind, metavar=metavar, help=flag.meaning
            )
    group.add_argument("-m", "--module", action="store_true", help="(always so, as of deepspeed)")


def split(arguments: Sequence[str], *, prog: str) -> tuple[dict[str, Any], list[str]]:
    """The launcher's flags that are given, by key, and everything else in its order.

    Ends the process with a usage message on a flag whose value is missing or of another kind.

    Args:
        arguments: A command line; the flags may stand anywhere in it.
        prog: Name of the command for messages.
    """
    parser = argparse.ArgumentParser(
        prog=prog, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    add_flags(parser)
    found, rest = parser.parse_known_args(arguments)
    flags = vars(found)
    flags.pop("module", None)
    return flags, rest


def require_consistent(flags: Mapping[str, Any]) -> None:
    """Refuse what the launcher would answer with a traceback, or not at all.

    Raises:
        ConfigError: With all that is wrong.
    """
    filtered = [key for key in ("include", "exclude") if key in flags]
    problems = [
        f"--{key}={flags[key]}: must be at least 1"
        for key in ("num_gpus", "num_nodes", "master_port", "ssh_port")
        if key in flags and flags[key] < 1
    ]
    problems += [
        f"--{key} and --{filtered[0]}: give one of the two"
        for key in (*filtered[1:], "num_gpus", "num_nodes")
        if filtered and key in flags
    ]
    problems += [
        f"--{key}={flags[key]}: must be at most {_HIGHEST_PORT}"
        for key in ("master_port", "ssh_port")
        if flags.get(key, 0) > _HIGHEST_PORT
    ]
    problems += _of_launcher(flags.get("launcher", "pdsh"), flags)
    problems += _by_hand(flags)
    if problems:
        raise ConfigError(problems)


def words(flags: Mapping[str, Any]) -> list[str]:
    """The flags as the DeepSpeed launcher reads them, without our own."""
    found = []
    for flag in FLAGS:
        if flag.key in OUR_OWN or flag.key not in flags:
            continue
        name = f"--{flag.key}"
        found.append(name if flag.kind is None else f"{name}={flags[flag.key]}")
    return found


def _of_launcher(name: str, flags: Mapping[str, Any]) -> list[str]:
    """What is wrong with a launcher, or with flags that it does not take."""
    if name.lower() not in LAUNCHERS:
        problem = f"--launcher={name}: must be one of {', '.join(LAUNCHERS)}"
        reason = _WITHOUT_MODULE.get(name.lower())
        return [f"{problem}; DeepSpeed's own start by it {reason}" if reason else problem]
    if name.lower() == "pdsh":
        return []
    return [
        f"--{key}={flags[key]}: not with --launcher={name}, which starts a rank on every slot of the "
        "host file; write it so"
        for key in ("include", "exclude", "num_gpus", "num_nodes")
        if key in flags
    ]


def _by_hand(flags: Mapping[str, Any]) -> list[str]:
    """What --no_ssh needs, and who needs it."""
    if "no_ssh" not in flags:
        if "node_rank" in flags:
            return [f"--node_rank={flags['node_rank']}: only with --no_ssh; else leave it out"]
        return []
    return [
        f"--no_ssh: also give --{key}, {why}"
        for key, why in (
            ("hostfile", "the same file on all machines"),
            ("node_rank", "the place of this machine in that file, from 0"),
            ("master_addr", "a name of the first machine that all machines reach"),
        )
        if key not in flags
    ]
