"""Fill the tables of a run's cached teachers: ``... --module vembed_ds.precompute_teacher``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vembed_ds.command import Prepared, add_run_arguments, announce_rank, load_run, run_on_ranks

EXAMPLES = """examples:
  vembed-ds precompute-teacher --config my.yaml
  vembed-ds precompute-teacher --num_gpus 8 --hostfile hosts --config my.yaml
  vembed-ds precompute-teacher --config my.yaml --config_override teacher_cache=vectors
  vembed-ds precompute-teacher --config my.yaml --dry_run
exit codes:
  0    every item of the training data is in teacher_cache; with --dry_run: it could be
  1    unexpected, or a rank or loader process died, or a disk gave an error: start again, it goes on
  2    something is to be mended first; the message says what
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, set up this rank, embed; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    announce_rank(arguments)
    return run_on_ranks(lambda: _prepare(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vembed-ds precompute-teacher",
        description="Embed every item of the training data with the cached teachers of a run, into "
        "teacher_cache; what is there already is not embedded again. Training does the same by "
        "itself: the command is for doing it on other machines, or once for many runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="read settings and data, say which tables would be filled, and stop before a teacher is loaded",
    )
    return parser


def _prepare(arguments: argparse.Namespace) -> Prepared:
    config = load_run(arguments)

    def work() -> None:
        from vembed_ds.training.precompute_run import precompute_teachers

        precompute_teachers(config, dry_run=arguments.dry_run)

    return Prepared(config.run.timeout_minutes, work)


if __name__ == "__main__":
    sys.exit(main())
