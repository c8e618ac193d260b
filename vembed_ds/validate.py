"""Command: look at every record of a run's data before training on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from vembed_ds.command import positive_number
from vembed_ds.config.loading import load_config
from vembed_ds.config.schema import Config
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.images import open_image
from vembed_ds.data.inspection import (
    Findings,
    Lines,
    Problem,
    as_problem,
    inspect,
    shared_pairs,
    summary,
)
from vembed_ds.data.order import Order
from vembed_ds.data.readers import files_of
from vembed_ds.data.records import Item
from vembed_ds.errors import DataError, VembedError
from vembed_ds.evaluation.plots import check_matplotlib
from vembed_ds.evaluation.report import (
    GridRow,
    Picture,
    check_writable,
    retrieval_grid,
    write_report,
)
from vembed_ds.training.data_setup import (
    Source,
    build_dataset,
    dataset_entries,
    follows_scores,
    open_source,
    validation_entries,
)
from vembed_ds.training.loss_setup import check_data, loss_configs
from vembed_ds.training.model_setup import model_spec, setup_processor

EXAMPLE = """\
examples:
  vembed-ds validate --config my.yaml
  vembed-ds validate --config my.yaml --thumbnails pairs.png --output report.json
exit code: 0 all records can be used (--dry_run: read), 1 some cannot, 2 the configuration is wrong
"""

EXIT_PROBLEMS, EXIT_CONFIG = 1, 2
LISTED = 20  # problems of a kind that are printed
THUMBNAILS = 8


@dataclass
class Checked:
    """One table and what was found in it."""

    key: str
    source: Source | None
    found: Findings
    figures: dict[str, Any]
    lines: Lines
    dataset: PairDataset | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code: 0, 1 when records cannot be used, 2 after an error of configuration.
    """
    arguments = build_parser().parse_args(argv)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        config = load_config(arguments.config, arguments.config_override)
        check_outputs(arguments)
        if arguments.dry_run:
            sys.stdout.write("\n".join(_planned(config, arguments)) + "\n")
            return 0
        checked = check(config, arguments)
        notes = list(_notes(config, checked))
        if arguments.output:
            report = {"data": [_report(table) for table in checked], "notes": notes}
            write_report(arguments.output, report)
        if arguments.thumbnails:
            _draw(arguments.thumbnails, checked)
    except VembedError as error:
        sys.stderr.write(f"error: {'; '.join(str(error).splitlines())}\n")
        return EXIT_CONFIG
    sys.stdout.write("\n".join([*_text(checked), *(f"note: {note}" for note in notes)]) + "\n")
    return EXIT_PROBLEMS if any(table.found.counts for table in checked) else 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vembed-ds validate",
        description="Read every training and validation record as training would, without loading "
        "a model's weights, and say which cannot be used; also whether the loss looks at what the data "
        "has, and whether the data fills a global batch.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="YAML file of the run")
    add(
        "--config_override",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values that win over the YAML file",
    )
    add("--limit", type=positive_number, metavar="N", help="N records of each table, evenly spread")
    add("--images", choices=["decode", "exists"], default="decode", help="what is done with images")
    add("--thumbnails", metavar="PNG", help="draw some pairs, evenly spread")
    add("--output", metavar="JSON", help="write figures and problems to this file")
    add("--dry_run", action="store_true", help="say what would be read and written, and do neither")
    return parser


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        ConfigError: matplotlib is missing, or a path cannot be written.
    """
    if arguments.thumbnails:
        check_matplotlib(f"--thumbnails {arguments.thumbnails}")
    for flag in ("output", "thumbnails"):
        if path := getattr(arguments, flag):
            check_writable(path, flag=f"--{flag}")


def check(config: Config, arguments: argparse.Namespace) -> list[Checked]:
    """Open and read all tables of a configuration.

    Raises:
        ConfigError: The model's processor does not load, or a loss does not look at what the data has.
    """
    checked = [_opened(key, entry, config) for key, entry in _tables(config)]
    readers = [table.source.reader for table in checked if table.source is not None]
    if not readers:
        return checked
    processor = setup_processor(config, model_spec(config.model), needed=readers)
    for table in checked:
        if table.source is None:
            continue
        table.dataset = build_dataset(table.source, processor=processor, config=config)
    _check_losses(config, checked)
    for table in checked:
        if table.source is None or table.dataset is None:
            continue
        number = len(table.dataset)
        step = max(1.0, number / (arguments.limit or number))
        table.found = inspect(
            table.dataset,
            rows=[int(row) for row in np.arange(0, number, step)],
            images=arguments.images,
            num_threads=config.data.num_workers,
        )
        table.figures = {"of": number, **summary(table.found, processor=processor)}
        table.lines = Lines(files_of(table.source.paths), num_records=number)
    _count_leaks(checked)
    return checked


def _check_losses(config: Config, checked: Sequence[Checked]) -> None:
    """What training says of losses and data, as far as the data could be opened."""
    losses = loss_configs(config.loss, dataset_entries(config.data))
    for loss, table in zip(losses, _trained(checked), strict=True):
        if table.dataset is not None:
            check_data([loss], [table.dataset], config.distillation)


def _notes(config: Config, checked: Sequence[Checked]) -> Iterator[str]:
    """Whether the data fills a global batch, even on one rank; records that are bad still count."""
    trained = _trained(checked)
    datasets = [table.dataset for table in trained if table.dataset is not None]
    if len(datasets) < len(trained):
        return
    try:
        Order(
            [len(dataset) for dataset in datasets],
            weights=[entry.weight for entry in dataset_entries(config.data).values()],
            global_batch_size=config.training.batch_size,
            seed=config.training.seed,
            homogeneous=config.data.batching == "homogeneous",
            names=[dataset.reader.origin for dataset in datasets],
        )
    except DataError as error:
        yield f"on one rank, {error}"


def _trained(checked: Sequence[Checked]) -> list[Checked]:
    """The training tables, in the order of the data sets."""
    return [table for table in checked if not _is_validation(table.key)]


def _is_validation(key: str) -> bool:
    return key.endswith("val_data_path")


def _tables(config: Config) -> Iterator[tuple[str, Any]]:
    for name, entry in dataset_entries(config.data).items():
        yield f"datasets[{name}].data_path" if name else "data_path", entry
    for name, entry in validation_entries(config.data).items():
        yield f"datasets[{name}].val_data_path" if name else "val_data_path", entry


def _planned(config: Config, arguments: argparse.Namespace) -> Iterator[str]:
    """What a dry run says.

    Raises:
        DataError: Data cannot be opened.
    """
    for key, entry in _tables(config):
        source = open_source(entry, key=key, teacher_scores=_has_scores(config, key))
        number = len(source.table)
        read = min(number, arguments.limit or number)
        yield f"{key}={source.reader.origin}: {read:,} of {number:,} records would be read"
    for path in (arguments.output, arguments.thumbnails):
        if path:
            yield f"would write {path}"


def _opened(key: str, entry: Any, config: Config) -> Checked:
    found = Findings()
    source = None
    try:
        source = open_source(entry, key=key, teacher_scores=_has_scores(config, key))
    except DataError as error:
        found.report(as_problem(error))
    return Checked(key, source, found, {}, Lines([], num_records=0))


def _has_scores(config: Config, key: str) -> bool:
    """Whether a table holds a teacher's scores."""
    return follows_scores(config) and not _is_validation(key)


def _count_leaks(checked: Sequence[Checked]) -> None:
    """Validation pairs that are trained on make the figures of a run too good."""
    trained = Findings()
    for table in _trained(checked):
        trained.add(table.found)
    for table in checked:
        if _is_validation(table.key) and table.source is not None:
            table.figures["pairs_also_trained_on"] = shared_pairs(table.found, trained)


def _text(checked: Sequence[Checked]) -> Iterator[str]:
    for table in checked:
        origin = "" if table.source is None else f"={table.source.reader.origin}"
        yield f"{table.key}{origin}: {_verdict(table)}"
        for name, value in table.figures.items():
            if name not in ("records", "of"):
                yield f"  {name.replace('_', ' ')}: {_shown(value)}"
        yield from _table(table)
        yield ""


def _verdict(table: Checked) -> str:
    problems = ", ".join(f"{count} {kind}" for kind, count in table.found.counts.items())
    verdict = f"PROBLEMS ({problems})" if problems else "all can be used"
    if table.source is None:
        return verdict
    return f"{table.found.records} of {table.figures['of']} records read, {verdict}"


def _shown(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(
        f"{name.replace('_', ' ')} {f'({_shown(inner)})' if isinstance(inner, Mapping) else inner}"
        for name, inner in value.items()
    )


def _table(table: Checked) -> Iterator[str]:
    rows = [("kind", "place", "problem")]
    for kind, count in table.found.counts.items():
        chosen = [problem for problem in table.found.problems if problem.kind == kind][:LISTED]
        rows += [
            (kind, table.lines.find(p.record), "; ".join(p.message.splitlines())) for p in chosen
        ]
        if count > len(chosen):
            rows.append((kind, "", f"and {count - len(chosen)} more (--output lists them)"))
    if len(rows) > 1:
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for row in rows:
            yield f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}"


def _report(table: Checked) -> dict[str, Any]:
    def entry(problem: Problem) -> dict[str, Any]:
        place = table.lines.find(problem.record)
        return {
            "kind": problem.kind,
            "record": problem.record,
            "place": place,
            "message": problem.message,
        }

    return {
        "key": table.key,
        "data_path": None if table.source is None else table.source.reader.origin,
        "figures": table.figures,
        "counts": dict(table.found.counts),
        "problems": [entry(problem) for problem in table.found.problems],
    }


def _draw(path: str, checked: Sequence[Checked]) -> None:
    """Some records of all tables: the query, and what belongs to it framed green."""
    datasets = [table.dataset for table in checked if table.dataset is not None]
    rows = [row for dataset in datasets for row in _grid_rows(dataset, THUMBNAILS // len(datasets))]
    retrieval_grid(
        path,
        rows=rows,
        headline=f"{len(rows)} pairs",
        subtitle="Positives are framed green.",
    )


def _grid_rows(dataset: PairDataset, wanted: int) -> Iterator[GridRow]:
    for row in np.unique(np.linspace(0, len(dataset) - 1, max(1, wanted)).astype(int)):
        try:
            record = dataset.record(int(row))
            results = [_picture(item) for item in (record.positive, *record.negatives[:3])]
            yield GridRow(_picture(record.query), results, [True] + [False] * (len(results) - 1))
        except DataError:  # it stands in the table of problems
            continue


def _picture(item: Item) -> Picture:
    if item.image is not None:
        return open_image(item.image, origin="thumbnail")
    assert item.text is not None  # a record has one of them
    return item.text


if __name__ == "__main__":
    raise SystemExit(main())
