"""Look at machines, network and folders before a run: ``vembed-ds doctor``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vembed_ds.command import EXIT_ERROR, Prepared, announce_rank, run_on_ranks
from vembed_ds.distributed.announced import DEFAULT_PORT, other_launcher
from vembed_ds.errors import ConfigError, VembedError
from vembed_ds.launching.flags import add_flags, split

if TYPE_CHECKING:
    from vembed_ds.preflight.findings import Finding

EXAMPLES = """\
examples:
  vembed-ds doctor                                     this machine: packages, devices, disk, a 2-rank all-reduce
  vembed-ds doctor --config my.yaml                    also the run's output_dir and models
  vembed-ds doctor --num_gpus 8                        this machine, with 8 ranks
  vembed-ds doctor --hostfile hosts --config my.yaml   every machine of `hosts`, then all their ranks together
  srun vembed-ds doctor --config my.yaml               the ranks of an allocation; torchrun and mpirun alike
exit code: 0 nothing failed, 2 something did: the table says what to do. Warnings are no failures.
"""
TIMEOUT_MINUTES = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Look, print the table; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(words)
    announce_rank(arguments)
    if "RANK" in os.environ or other_launcher(os.environ) is not None:
        return run_on_ranks(lambda: _prepare(arguments))
    flags, rest = split(words, prog="vembed-ds doctor")
    try:
        return _launched(flags, rest, arguments) if flags else _alone(arguments)
    except VembedError as error:
        sys.stderr.write(f"vembed-ds doctor: {type(error).__name__}: {error}\n")
        return EXIT_ERROR


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vembed-ds doctor",
        usage="vembed-ds doctor [-h] [--config CONFIG] [--output_dir DIR] [--json] [flags of the launcher]",
        description="Look at what a run needs, and print a table of findings with remedies: nothing "
        "is changed. Packages, devices, port, folders, clocks, extensions, disk, models, an exchange "
        "between ranks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, help="YAML file of a run: look at its folder and models"
    )
    parser.add_argument("--output_dir", type=Path, help="folder of the results, if not the run's")
    parser.add_argument(
        "--json", action="store_true", help="print the findings as one line of JSON"
    )
    parser.add_argument("--local_rank", type=int, help="set by the DeepSpeed launcher")
    add_flags(parser)
    return parser


def _alone(arguments: argparse.Namespace) -> int:
    """This machine, and two ranks on it."""
    from vembed_ds.preflight import machine
    from vembed_ds.preflight.facts import port_owner
    from vembed_ds.preflight.findings import FAIL, Finding
    from vembed_ds.preflight.hosts import port_finding
    from vembed_ds.preflight.local_ranks import ranks_findings

    findings = [machine.packages(), port_finding(DEFAULT_PORT, port_owner(DEFAULT_PORT))]
    words = [word for key in ("config", "output_dir") for word in _given(arguments, key)]
    command = ["-m", "vembed_ds.doctor", "--json", *words]
    try:
        devices = _count_devices()
    except (ImportError, OSError) as error:
        remedy = "install torch again (constraints.txt)"
        findings.append(Finding("devices", f"torch cannot be imported: {error}", FAIL, remedy))
        return _show(findings, as_json=arguments.json)
    _say("starting 2 ranks on this machine")
    of_ranks = ranks_findings(command, size=1 if devices == 1 else 2)
    findings += [finding for finding in of_ranks if finding.check != "packages"]
    if devices == 1:  # two ranks cannot share it
        pair = ranks_findings(command, size=2, environment={"DS_ACCELERATOR": "cpu"})
        findings += [finding for finding in pair if finding.check in ("ranks", "all-reduce")]
    return _show(findings, as_json=arguments.json)


def _launched(flags: Mapping[str, Any], rest: Sequence[str], arguments: argparse.Namespace) -> int:
    """The machines that the flags name, asked by ssh, then this command on all their ranks."""
    from vembed_ds.launching.start import launch
    from vembed_ds.launching.target import target_of
    from vembed_ds.preflight.findings import failed, table
    from vembed_ds.preflight.hosts import ask_hosts, require_program

    target = target_of(flags)
    if target.by_ssh and "no_preflight" not in flags:
        require_program(flags)
        findings = ask_hosts(list(target.hosts), flags)
        sys.stdout.write(f"Asked by ssh from {platform.node()}:\n{table(findings)}")
        sys.stdout.flush()
        if failed(findings):
            return EXIT_ERROR
    ranks = sum(target.hosts.values()) or flags.get("num_gpus", "all")
    _say(f"starting {ranks} ranks")
    return launch("vembed_ds.doctor", rest, flags=target.flags, by_ssh=target.by_ssh)


def _prepare(arguments: argparse.Namespace) -> Prepared:
    """On a rank."""
    config = None
    if arguments.config is not None:
        from vembed_ds.config.loading import load_config

        config = load_config(arguments.config, [])
    folder = arguments.output_dir or Path(config.run.output_dir if config else ".")
    models = _models(config)

    def work() -> None:
        findings = _look(folder, models)
        from vembed_ds.distributed import comm
        from vembed_ds.preflight.findings import failed

        if comm.is_main():
            _show(findings, as_json=arguments.json)
        if failed(findings):
            raise ConfigError("the table of rank 0 says what failed, and what to do")

    return Prepared(TIMEOUT_MINUTES, work)


def _look(folder: Path, models: Sequence[str]) -> list[Finding]:
    """All findings of a world. Collective."""
    from vembed_ds.preflight import machine, world

    of_machine = [
        machine.packages(),
        world.devices(),
        machine.disk(folder),
        machine.shared_memory(),
        machine.hub(),
        *(machine.model(name) for name in models),
        machine.compiler(),
        world.extensions(),
    ]
    findings = world.of_all_machines(of_machine)
    together = [world.alike(), world.clocks(), world.shared_folder(folder), world.exchange()]
    return [*findings, *together]


def _models(config: Any) -> list[str]:
    """Names of a run's models, where they are names."""
    if config is None:
        return []
    keys = ("model_name", "text_model_name", "image_model_name")
    return [value for key in keys if isinstance(value := getattr(config.model, key), str)]


def _given(arguments: argparse.Namespace, key: str) -> list[str]:
    value = getattr(arguments, key)
    return [] if value is None else [f"--{key}", str(value)]


def _count_devices() -> int:
    from vembed_ds.launching.target import local_devices

    return local_devices()


def _show(findings: Sequence[Finding], *, as_json: bool) -> int:
    from vembed_ds.preflight.findings import failed, table

    sys.stdout.write(json.dumps(findings) + "\n" if as_json else table(findings))
    sys.stdout.flush()
    return EXIT_ERROR if failed(findings) else 0


def _say(text: str) -> None:
    sys.stderr.write(f"vembed-ds doctor: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
