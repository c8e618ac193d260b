"""Command: what a run would take on so many accelerators, and how to run it best."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from vembed_ds.command import EXIT_ERROR, quiet_libraries

EXAMPLE = """\
examples:
  vembed-ds plan --config my.yaml --gpus 8 --gpu_memory 80
  vembed-ds plan --config my.yaml --ds_config ds_configs/zero2.json --gpus 8 --nodes 4 \\
      --gpu_memory 141 batch_size=1024 precision=bf16
needs neither weights nor an accelerator; docs/scaling.md says how to read the table
exit code: 0 something fits (with --ds_config: what is configured), 1 nothing does, 2 something is to be mended
"""

EXIT_TOO_LARGE = 1
MOST = 1_000_000  # of anything that is counted here


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    quiet_libraries()
    from transformers.utils import logging as transformers_logging

    from vembed_ds.config.loading import load_config, setting_origins
    from vembed_ds.errors import VembedError
    from vembed_ds.planning.report import as_json, as_text

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        overrides = [*arguments.config_override, *arguments.overrides]
        config = load_config(arguments.config, overrides)
        from vembed_ds.training.plan_machine import Machine, plan_on

        machine = Machine(
            gpus=arguments.gpus,
            nodes=arguments.nodes,
            memory_gib=arguments.gpu_memory,
            device=arguments.device,
        )
        found = plan_on(
            config,
            machine,
            title=str(arguments.config),
            ds_config=arguments.ds_config,
            origins=setting_origins(arguments.config, overrides),
            tokens=arguments.tokens,
        )
    except VembedError as error:
        sys.stderr.write(f"error: {'; '.join(str(error).splitlines())}\n")
        return EXIT_ERROR
    if arguments.json:
        sys.stdout.write(json.dumps(as_json(found), indent=2) + "\n")
    else:
        sys.stdout.write(as_text(found))
    fits = found.lines[0].fits if found.configured else found.advice.way is not None
    return 0 if fits else EXIT_TOO_LARGE


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vembed-ds plan",
        description="Say what a run takes of a rank's memory and sends per step at every ZeRO stage, "
        "whether it fits, and which settings to take. Nothing is loaded but configurations, the tokenizer and "
        "some records.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="YAML file of the run")
    add("--ds_config", type=Path, help="DeepSpeed JSON file: also plan what it configures")
    add("--gpus", type=_count, required=True, help="accelerators of a machine: a rank each")
    add("--nodes", type=_count, default=1, help="machines")
    add("--gpu_memory", type=_gib, required=True, metavar="GIB", help="of one accelerator")
    add("--tokens", type=_count, help="of every text; no data is read then")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="what is planned for")
    add("--json", action="store_true", help="print plain values, sizes in bytes")
    add(
        "--config_override",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values that win over the YAML file",
    )
    add("overrides", nargs="*", metavar="KEY=VALUE", help="values that win over the YAML file")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 to {MOST}")
    return int(text)


def _gib(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number of GiB above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
