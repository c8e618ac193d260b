"""Command: hard negatives for a data set, on every rank."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vembed_ds.command import Prepared, announce_rank, number_from_0, positive_number, run_on_ranks

if TYPE_CHECKING:
    from vembed_ds.mining.contents import Contents
    from vembed_ds.mining.opening import Opened
    from vembed_ds.mining.rules import Rules

EXAMPLES = """examples:
  vembed-ds mine --model output/model --data pairs.jsonl --output mined.jsonl
  vembed-ds mine --model output/model --data pairs.parquet --corpus corpus.jsonl --output mined.parquet \\
      --num_negatives 7 --range_min 10 --range_max 100 --sampling random --seed 1
  vembed-ds mine --num_gpus 8 --model output/model --guide_model models/large \\
      --data pairs.jsonl --output mined.jsonl

writes the records with the column of negatives that training reads: train on it as it is, with data_path: mined.jsonl
and the same retrieval_mode, column_mapping and image_root. Rules and their sources: docs/encode_and_mine.md.

exit codes:
  0    written
  1    unexpected, or a rank or loader process died, or a disk gave an error: start again
  2    something is to be mended first; the message says what
  130  stopped by Ctrl-C; nothing was written
"""
TIMEOUT_MINUTES = 30.0
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, set up this rank, mine; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    announce_rank(arguments)
    try:
        return run_on_ranks(lambda: _prepare(arguments))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing was written\n")
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vembed-ds mine",
        description="Find for every query the documents that a model takes for answers and that are none, "
        "and write the data with them as negatives.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_data(parser.add_argument_group("data"))
    _add_rules(parser.add_argument_group("rules"))
    _add_run(parser.add_argument_group("run"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", required=True, nargs="+", metavar="DATA", help="pairs, as training reads them")
    add("--output", required=True, type=Path, metavar="FILE", help="a new .parquet or .jsonl file")
    add("--corpus", nargs="+", default=[], metavar="DATA", help="further documents, one a row")
    add(
        "--corpus_columns",
        nargs="+",
        action="extend",
        default=[],
        type=_pair,
        metavar="KEY=COLUMN",
        help="of --corpus: text= and image=; default: as the positives' columns, else by their names",
    )
    add("--retrieval_mode", metavar="MODE", help="such as t2i; default: as stored with the model")
    add(
        "--column_mapping",
        nargs="+",
        action="extend",
        type=_pair,
        metavar="ROLE=COLUMN",
        help="such as query=question; default: as stored with the model",
    )
    add("--image_root", metavar="FOLDER", help="of relative image paths; default: as stored")
    add("--allow_images_outside_root", action="store_true", help="let image paths leave image_root")
    add("--allow_image_urls", action="store_true", help="fetch images that are URLs")
    add(
        "--replace_negatives",
        action="store_true",
        help="leave out the negatives that the data has; they are candidates like other documents",
    )
    add("--drop_incomplete", action="store_true", help="leave out records with too few negatives")
    add("--overwrite", action="store_true", help="replace the file")


def _add_rules(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--num_negatives", type=int, default=5, metavar="N", help="of a record, at most (5)")
    add("--range_min", type=int, default=0, metavar="N", help="skip the N best that are left (0)")
    add(
        "--range_max",
        type=int,
        metavar="N",
        help="look at the N closest documents that are no positives; default: range_min + 10 a negative",
    )
    add("--margin", type=float, metavar="X", help="at most the positive's similarity - X")
    add(
        "--relative_margin",
        type=_share,
        default=0.05,
        metavar="X",
        help="at most (1 - X) of the positive's similarity (0.05); none: no such rule",
    )
    add("--max_score", type=float, metavar="X", help="at most this similarity")
    add("--min_score", type=float, metavar="X", help="at least this similarity")
    add("--sampling", choices=("top", "random"), default="top", help="of what is left (top)")
    add("--seed", type=int, default=0, metavar="N", help="of random sampling (0)")
    add("--guide_model", metavar="FOLDER", help="a model that says what may be an answer")
    add(
        "--guide_margin",
        type=float,
        metavar="X",
        help="by the guide, at most the positive's similarity - X (0 with a guide)",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--model",
        required=True,
        metavar="FOLDER",
        help="exported folder, or any Hugging Face model",
    )
    for of in ("", "guide_"):
        name = "guide" if of else "model"
        for role in ("query", "document"):
            text = f"what the {name} reads before a {role}; default: as stored with it"
            add(f"--{of}{role}_instruction", metavar="TEXT", help=text)
    add(
        "--batch_size",
        type=positive_number,
        default=32,
        metavar="N",
        help="items of a rank at a time",
    )
    add(
        "--num_workers",
        type=number_from_0,
        default=4,
        metavar="N",
        help="loader processes per rank, at most",
    )
    add(
        "--dry_run",
        action="store_true",
        help="read the data, say what would be done, write nothing",
    )
    add("--trust_remote_code", action="store_true", help="run Python code that the models bring")
    add("--local_rank", type=int, help="set by the DeepSpeed launcher")


def _prepare(arguments: argparse.Namespace) -> Prepared:
    rules = _rules(arguments)
    return Prepared(TIMEOUT_MINUTES, lambda: run(arguments, rules))


def _rules(arguments: argparse.Namespace) -> Rules:
    """The rules of the command line.

    Raises:
        ConfigError: A value makes no sense.
    """
    from vembed_ds.errors import ConfigError
    from vembed_ds.mining.rules import Rules

    guide_margin = arguments.guide_margin
    if arguments.guide_model is None and guide_margin is not None:
        raise ConfigError(f"--guide_margin {guide_margin}: there is no --guide_model; give one")
    if arguments.guide_model is not None and guide_margin is None:
        guide_margin = 0.0
    return Rules(
        num_negatives=arguments.num_negatives,
        range_min=arguments.range_min,
        range_max=arguments.range_max,
        margin=arguments.margin,
        relative_margin=arguments.relative_margin,
        max_score=arguments.max_score,
        min_score=arguments.min_score,
        guide_margin=guide_margin,
        sampling=arguments.sampling,
        seed=arguments.seed,
    )


def run(arguments: argparse.Namespace, rules: Rules | None = None) -> None:
    """Mine what the arguments name. Collective.

    Args:
        arguments: Of :func:`build_parser`.
        rules: Of them.

    Raises:
        VembedError: On every rank, for everything that a user can put right.
    """
    import numpy as np

    from vembed_ds.distributed import comm
    from vembed_ds.errors import DataError
    from vembed_ds.mining.contents import read_contents
    from vembed_ds.mining.opening import open_all
    from vembed_ds.mining.output import write_mined
    from vembed_ds.mining.run import mine
    from vembed_ds.mining.summary import kept_counts, summarize

    rules = rules or _rules(arguments)
    opened = comm.run_together(lambda: open_all(arguments), doing="reading models and data")
    comm.require_equal(len(opened.dataset), what="number of records in --data")
    contents = read_contents(opened.dataset, opened.corpus)
    _say(_planned(arguments, opened, contents, rules))
    if arguments.dry_run:
        _say("nothing was written")
        return
    mined = mine(
        opened.model,
        contents,
        opened.dataset,
        opened.corpus,
        rules=rules,
        guide=opened.guide,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
    )
    least = rules.num_negatives if arguments.drop_incomplete else 0
    kept = np.flatnonzero(kept_counts(contents, mined) >= least)
    if not len(kept):
        raise DataError(
            f"--drop_incomplete: no record has {least} negatives, so that nothing is left to write; give a "
            "larger --range_max, a --corpus or fewer --num_negatives"
        )
    comm.run_on_main(
        lambda: write_mined(
            arguments.output,
            opened.table,
            kept,
            contents=contents,
            negatives=mined.negatives,
            reader=opened.dataset.reader,
            corpus=opened.corpus,
            column_mapping=opened.column_mapping,
        ),
        doing=f"writing {arguments.output}",
    )
    _say(summarize(contents, mined, rules=rules, dropped_records=arguments.drop_incomplete))


def _planned(
    arguments: argparse.Namespace, opened: Opened, contents: Contents, rules: Rules
) -> str:
    from vembed_ds.mining.output import negative_columns

    names = negative_columns(opened.dataset.reader, opened.column_mapping)
    columns = ", ".join(f"{name!r} ({part}s)" for part, name in names.items())
    guide = f", guide {arguments.guide_model}" if arguments.guide_model else ""
    return (
        f"data: {opened.dataset.reader.origin}: {len(contents.query_of):,} records, "
        f"{len(contents.queries):,} distinct queries, {len(contents.documents):,} distinct documents\n"
        f"model: {arguments.model}{guide}\n"
        f"rules: {rules.described()}\n"
        f"output: {arguments.output}: the columns of the data, and {columns}"
    )


def _say(text: str) -> None:
    from vembed_ds.distributed import comm

    if comm.is_main():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _pair(text: str) -> tuple[str, str]:
    key, equals, column = text.partition("=")
    if not equals or not key or not column:
        raise argparse.ArgumentTypeError(f"{text!r}: write KEY=COLUMN, for example query=question")
    return key, column


def _share(text: str) -> float | None:
    return None if text == "none" else float(text)


if __name__ == "__main__":
    sys.exit(main())
