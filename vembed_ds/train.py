"""Train: ``deepspeed --num_gpus 8 --module vembed_ds.train --ds_config DS --config YAML``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vembed_ds.command import (
    EXIT_CODES,
    Prepared,
    add_run_arguments,
    announce_rank,
    load_run,
    run_on_ranks,
)

EXAMPLES = """examples:
  vembed-ds train --ds_config ds_configs/zero2.json --config my.yaml
  vembed-ds train --num_gpus 8 --hostfile hosts --ds_config ds_configs/zero2.json --config my.yaml
  deepspeed --num_gpus 8 --module vembed_ds.train --ds_config ds_configs/zero2.json --config my.yaml
  vembed-ds train --ds_config ds_configs/zero2.json --config my.yaml \\
      --config_override lr=1e-4 batch_size=64
  ... --dry_run          say what would be trained, and leave nothing behind
  ... --resume auto      go on from the newest checkpoint of output_dir
  ... --resume auto --allow_change lr     the same, with another learning rate from there on
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, set up this rank, train; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    announce_rank(arguments)
    return run_on_ranks(lambda: _prepare(arguments))


def _prepare(arguments: argparse.Namespace) -> Prepared:
    from vembed_ds.config.loading import setting_origins
    from vembed_ds.engine.ds_config import load_ds_config

    config = load_run(arguments)
    origins = setting_origins(arguments.config, arguments.config_override)
    ds_config = load_ds_config(arguments.ds_config)

    def work() -> None:
        from vembed_ds.training.run import train

        train(
            config,
            ds_config,
            ds_origin=str(arguments.ds_config),
            resume=arguments.resume,
            origins=origins,
            allow_change=arguments.allow_change,
            process_ends=True,
            dry_run=arguments.dry_run,
        )

    return Prepared(config.run.timeout_minutes, work)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vembed-ds train",
        description="Train an embedding model on DeepSpeed.",
        epilog=EXAMPLES + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    parser.add_argument("--ds_config", type=Path, required=True, help="DeepSpeed JSON file")
    parser.add_argument(
        "--resume", metavar="PATH|auto", help="checkpoint or run folder to go on from"
    )
    parser.add_argument(
        "--allow_change",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="settings that may differ from those of the checkpoint that --resume goes on from",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="look at settings, folder, checkpoint and data, say what would be trained, and stop before "
        "a model is loaded or anything is written",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
