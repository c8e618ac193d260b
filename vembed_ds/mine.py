"""Command: hard negatives for a data set, on every rank."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vembed_ds.command import Prepared, announce_rank, run_on_ranks

if TYPE_CHECKING:
    import datasets

    from vembed_ds.data.dataset import PairDataset
    from vembed_ds.encoding.items import ItemTable
    from vembed_ds.inference import Encoder
    from vembed_ds.mining.contents import Contents
    from vembed_ds.mining.rules import Rules
    from vembed_ds.mining.vectors import Model

EXAMPLES = """examples:
  vembed-ds mine --model output/model --data pairs.jsonl --output mined.jsonl
  vembed-ds mine --model output/model --data pairs.parquet --corpus corpus.jsonl --output mined.parquet \\
      --num_negatives 7 --range_min 10 --range_max 100 --sampling random --seed 1
  deepspeed --num_gpus 8 --module vembed_ds.mine --model output/model --guide_model models/large \\
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
STORED_KEYS = ("retrieval_mode", "column_mapping", "image_root")
NEGATIVE_KEYS = ("negatives", "negative_images")


class Opened(NamedTuple):
    """The data, and the models that look at it."""

    table: datasets.Dataset
    dataset: PairDataset
    corpus: ItemTable | None
    column_mapping: dict[str, str]
    model: Model
    guide: Model | None


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
    add("--batch_size", type=_positive, default=32, metavar="N", help="items of a rank at a time")
    add(
        "--num_workers",
        type=_count,
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
    from vembed_ds.distributed import comm
    from vembed_ds.mining.contents import read_contents
    from vembed_ds.mining.run import mine
    from vembed_ds.mining.summary import summarize

    rules = rules or _rules(arguments)
    opened = comm.run_together(lambda: _open(arguments), doing="reading models and data")
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
    comm.run_on_main(
        lambda: _write(arguments, opened, contents, mined, rules),
        doing=f"writing {arguments.output}",
    )
    _say(summarize(contents, mined, rules=rules, dropped_records=arguments.drop_incomplete))


def _open(arguments: argparse.Namespace) -> Opened:
    """Models and data; local, so each rank reads for itself."""
    from transformers.utils import logging as transformers_logging

    from vembed_ds.encoding.items import load_items
    from vembed_ds.inference import Encoder
    from vembed_ds.mining.output import check_output

    transformers_logging.disable_progress_bar()
    table = load_items(arguments.data, flag="--data")
    check_output(arguments.output, table, overwrite=arguments.overwrite)
    encoder = Encoder(arguments.model, trust_remote_code=arguments.trust_remote_code)
    dataset, mapping = _open_pairs(arguments, table, encoder)
    corpus = _open_corpus(arguments, dataset) if arguments.corpus else None
    guide = None
    if arguments.guide_model is not None:
        judge = Encoder(arguments.guide_model, trust_remote_code=arguments.trust_remote_code)
        _check_parts(judge, dataset, name="--guide_model")
        guide = _model(arguments, judge, name="guide", flag="--guide_")
    return Opened(
        table, dataset, corpus, mapping, _model(arguments, encoder, name="model", flag="--"), guide
    )


def _open_pairs(
    arguments: argparse.Namespace, table: datasets.Dataset, encoder: Encoder
) -> tuple[PairDataset, dict[str, str]]:
    from vembed_ds.data.dataset import PairDataset
    from vembed_ds.data.records import RecordReader
    from vembed_ds.errors import ConfigError

    stated = {key: _stated(arguments, encoder.settings, key) for key in STORED_KEYS}
    mapping: dict[str, str] = stated["column_mapping"]
    columns = table.column_names
    present = {
        role: column
        for role, column in mapping.items()
        if role not in NEGATIVE_KEYS or column in columns
    }
    reader = RecordReader(
        columns,
        retrieval_mode=stated["retrieval_mode"],
        column_mapping=present,
        image_root=stated["image_root"],
        origin=", ".join(arguments.data),
        allow_images_outside_root=arguments.allow_images_outside_root,
        allow_image_urls=arguments.allow_image_urls,
    )
    if reader.has_negatives and not arguments.replace_negatives:
        named = ", ".join(repr(name) for name in reader.negative_columns.values())
        raise ConfigError(
            f"{reader.origin}: has negatives (column {named}); give --replace_negatives to find others in "
            "their place, or remove the column"
        )
    dataset = PairDataset(table, reader=reader, processor=encoder.processor, seed=0)
    _check_parts(encoder, dataset, name="--model")
    return dataset, mapping


def _stated(arguments: argparse.Namespace, settings: dict[str, Any], key: str) -> Any:
    """A setting of the command line, else what is stored with the model."""
    from vembed_ds.errors import ConfigError

    given = getattr(arguments, key)
    if given is not None:
        return dict(given) if key == "column_mapping" else given
    stored = settings.get(key, {"column_mapping": {}, "image_root": ""}.get(key))
    if stored is None:
        raise ConfigError(
            f"--{key}: {arguments.model} does not state one; give it, as training will have it"
        )
    return stored


def _check_parts(encoder: Encoder, dataset: PairDataset, *, name: str) -> None:
    from vembed_ds.errors import ConfigError

    for part in sorted(dataset.reader.parts - set(encoder.model.parts)):
        role, _ = dataset.reader.columns_of(part)[0]
        raise ConfigError(
            f"{name}: retrieval_mode={dataset.reader.retrieval_mode}: the {role} is {part}, but the model "
            f"embeds {' and '.join(encoder.model.parts)}; choose another mode or model"
        )


def _open_corpus(arguments: argparse.Namespace, dataset: PairDataset) -> ItemTable:
    """Documents that are read as the positives are."""
    from vembed_ds.encoding.items import ItemColumns, ItemTable, choose_columns, load_items
    from vembed_ds.errors import ConfigError

    origin = ", ".join(arguments.corpus)
    table = load_items(arguments.corpus, flag="--corpus")
    own = dataset.reader.role_columns["positive"]
    given = dict(arguments.corpus_columns)
    if not given and set(own.values()) <= set(table.column_names):
        given = dict(own)
    found = choose_columns(
        table.column_names, role="document", given=given, origin=origin, flag="--corpus_columns"
    )
    parts = {part: column for part, column in found.parts.items() if part in own}
    if set(parts) != set(own):
        raise ConfigError(
            f"{origin}: the positives are {' and '.join(own)}, and of these --corpus has "
            f"{' and '.join(parts) or 'none'}; name its columns with --corpus_columns"
        )
    return ItemTable(
        table,
        columns=ItemColumns(parts, None, "document"),
        processor=dataset.processor,
        instruction="",
        image_root=dataset.reader.image_root,
        origin=origin,
        allow_images_outside_root=arguments.allow_images_outside_root,
        allow_image_urls=arguments.allow_image_urls,
    )


def _model(arguments: argparse.Namespace, encoder: Encoder, *, name: str, flag: str) -> Model:
    from vembed_ds.encoding.items import ROLES, role_instruction
    from vembed_ds.mining.vectors import Model

    found = {}
    for role in ROLES:
        key = f"{flag}{role}_instruction"
        given = getattr(arguments, key.removeprefix("--"))
        found[role] = role_instruction(encoder.settings, role, flag=key) if given is None else given
    return Model(encoder, found["query"], found["document"], name)


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


def _write(
    arguments: argparse.Namespace, opened: Opened, contents: Contents, mined: Any, rules: Rules
) -> None:
    import numpy as np

    from vembed_ds.mining.output import (
        NegativeCells,
        negative_columns,
        score_columns,
        write_file,
        written_rows,
    )
    from vembed_ds.mining.summary import kept_counts

    reader, table = opened.dataset.reader, opened.table
    rows = np.arange(len(contents.query_of))
    if arguments.drop_incomplete:
        rows = np.flatnonzero(kept_counts(contents, mined) >= rules.num_negatives)

    def places_of(record: int) -> Any:
        found = mined.negatives[contents.query_of[record]]
        return contents.documents[found[found >= 0]]

    names = negative_columns(reader, opened.column_mapping)
    replaced = reader.negative_columns.values()
    scores = score_columns(table, opened.column_mapping) if replaced else []
    parts = written_rows(
        table,
        rows,
        places_of,
        columns={
            name: NegativeCells(table, reader, opened.corpus, part) for part, name in names.items()
        },
        without=[*replaced, *scores],
    )
    write_file(arguments.output, parts)


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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 0 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
