"""Command: retrieval metrics of an exported model folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import SECTION_OF, Config
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.images import open_image
from vembed_ds.data.processors import EncodedItem
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import Item, RecordReader
from vembed_ds.distributed import comm
from vembed_ds.errors import ConfigError, DataError, VembedError
from vembed_ds.evaluation.metrics import top_documents
from vembed_ds.evaluation.report import (
    GridRow,
    Picture,
    comparison_table,
    metrics_table,
    retrieval_grid,
    write_report,
)
from vembed_ds.evaluation.retrieval import (
    Embed,
    Judgments,
    check_recall_k,
    embed_distinct,
    prefix_metrics,
    query_chunk,
    read_judgments,
)
from vembed_ds.inference import Encoder, embed_items
from vembed_ds.similarity import Embeddings

EXAMPLE = """\
example:
  python -m vembed_ds.evaluate --model output/model --data_path val.jsonl \\
      --config_override retrieval_mode=t2i eval_recall_k=[1,10] \\
      --output report.json --picture grid.png --before before.json
"""

STORED_KEYS = (
    "retrieval_mode",
    "column_mapping",
    "image_root",
    "query_instruction",
    "document_instruction",
)
EVALUATION_KEYS = (
    *STORED_KEYS,
    "allow_images_outside_root",
    "allow_image_urls",
    "eval_recall_k",
    "eval_batch_size",
    "num_workers",
    "prefetch_factor",
)
PICTURE_ROWS, PICTURE_COLUMNS = 8, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is printed on one line.
    """
    arguments = build_parser().parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        sys.stdout.write(run(arguments) + "\n")
    except VembedError as error:
        sys.stderr.write(f"error: {'; '.join(str(error).splitlines())}\n")
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vembed_ds.evaluate",
        description="Recall@k and MRR of an exported model: all distinct positives are searched "
        "with all distinct queries.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="FOLDER",
        help="folder from python -m vembed_ds.convert, or any Hugging Face model to compare with",
    )
    add("--data_path", required=True, nargs="+", metavar="DATA", help="pairs to evaluate on")
    add(
        "--config_override",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help=f"any of {', '.join(EVALUATION_KEYS)}; the first five default to what is stored "
        "with the model",
    )
    add(
        "--dims",
        nargs="+",
        type=_positive,
        metavar="N",
        help="also measure the first N dimensions of the embeddings; default: the mrl_dims that are "
        "stored with the model",
    )
    add("--output", metavar="JSON", help="write the metrics to this file")
    add("--picture", metavar="PNG", help="draw queries with their best documents")
    add("--trust_remote_code", action="store_true", help="run Python code that the model brings")
    add("--before", metavar="JSON", help="an earlier --output to compare with")
    return parser


def run(arguments: argparse.Namespace) -> str:
    """Evaluate, and write what was asked for.

    Returns:
        The table to print.

    Raises:
        VembedError: For everything that a user can put right.
    """
    if comm.world_size() > 1:
        raise ConfigError(
            f"WORLD_SIZE={comm.world_size()}: evaluation of a folder runs in one process; "
            "start it with python -m vembed_ds.evaluate, without a launcher"
        )
    before = read_before(Path(arguments.before)) if arguments.before else None
    encoder = Encoder(arguments.model, trust_remote_code=arguments.trust_remote_code)
    config = evaluation_config(arguments, settings=encoder.settings)
    dataset = open_pairs(arguments.data_path, config=config, encoder=encoder)
    judgments = read_judgments(dataset)
    check_recall_k(config.run.eval_recall_k, judgments=judgments, origin=dataset.reader.origin)
    query_emb, corpus_emb = embed_distinct(
        dataset,
        judgments,
        embed=embed_with(encoder),
        batch_size=config.run.eval_batch_size or config.training.batch_size,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
    )
    dims = arguments.dims or encoder.settings.get("mrl_dims") or ()
    check_dims(dims, width=corpus_emb.width)
    metrics = prefix_metrics(
        query_emb, corpus_emb, judgments, recall_k=config.run.eval_recall_k, dims=dims
    )
    if before is not None and not before.keys() & metrics.keys():
        raise DataError(
            f"--before {arguments.before}: has {', '.join(before) or 'no metrics'}, none of "
            f"{', '.join(metrics)}; give an --output of this command"
        )
    if arguments.output:
        write_report(arguments.output, report(arguments, config, metrics=metrics, before=before))
    if arguments.picture:
        found = (query_emb, corpus_emb)
        draw(arguments.picture, dataset, judgments, embeddings=found, metrics=metrics)
    return metrics_table(metrics) if before is None else comparison_table(before, metrics)


def evaluation_config(arguments: argparse.Namespace, *, settings: Mapping[str, Any]) -> Config:
    """The settings stored with the model, under those of the command line.

    Raises:
        ConfigError: For keys that evaluation does not use, invalid values, and when nothing
            says the retrieval mode.
    """
    given = [
        token.partition("=")[0].strip().rpartition(".")[2] for token in arguments.config_override
    ]
    if unused := [key for key in given if key in SECTION_OF and key not in EVALUATION_KEYS]:
        raise ConfigError(
            f"{unused[0]} (--config_override): evaluation does not use it; "
            f"remove it (used are {', '.join(EVALUATION_KEYS)})"
        )
    stored = {key: settings[key] for key in STORED_KEYS if key in settings and key not in given}
    if differing := [key for key, value in stored.items() if value is None]:
        raise ConfigError(
            f"{differing[0]}: {arguments.model} was trained on data sets that differ in it; give "
            f"--config_override {differing[0]}=..."
        )
    if "retrieval_mode" not in {*stored, *given}:
        raise ConfigError(
            f"retrieval_mode: {arguments.model} does not state one; give --config_override "
            "retrieval_mode=QUERY2POSITIVE, for example t2i"
        )
    values = {"model_name": str(arguments.model), "data_path": list(arguments.data_path), **stored}
    origin = f"{arguments.model}/vembed_config.json"
    return parse_config(values, origin=origin, overrides=arguments.config_override)


def open_pairs(paths: Sequence[str], *, config: Config, encoder: Encoder) -> PairDataset:
    """The pairs, to be encoded for this model.

    Raises:
        ConfigError: When the model lacks a tower for the retrieval mode.
        DataError: When the data cannot be read.
    """
    table = _load(paths)
    reader = RecordReader(
        table.column_names,
        retrieval_mode=config.data.retrieval_mode,
        column_mapping=config.data.column_mapping,
        image_root=config.data.image_root,
        allow_images_outside_root=config.data.allow_images_outside_root,
        allow_image_urls=config.data.allow_image_urls,
        origin=", ".join(paths),
        instructions={
            "query": config.data.query_instruction,
            "positive": config.data.document_instruction,
        },
    )
    for part in sorted(reader.parts - set(encoder.model.parts)):
        role, _ = reader.columns_of(part)[0]
        raise ConfigError(
            f"retrieval_mode={config.data.retrieval_mode}: the {role} is {part}, but the "
            f"model embeds {' and '.join(encoder.model.parts)}; choose another mode"
        )
    return PairDataset(table, reader=reader, processor=encoder.processor, seed=0)


def check_dims(dims: Sequence[int], *, width: int) -> None:
    """Refuse prefixes that the embeddings do not have: they would be measured as the whole.

    Raises:
        ConfigError: Naming the widest.
    """
    if dims and max(dims) > width:
        raise ConfigError(
            f"--dims {max(dims)}: the model's embeddings have {width} dimensions; leave out what is "
            f"above {width}"
        )


def embed_with(encoder: Encoder) -> Embed:
    """The model's embedding of a batch."""

    def embed(items: Sequence[EncodedItem]) -> Embeddings:
        return embed_items(encoder.model, encoder.processor, items)

    return embed


def read_before(path: Path) -> dict[str, float]:
    """Metrics of an earlier evaluation: a report, or a JSON object of numbers.

    Names may begin with ``eval/``, as the trackers have them.

    Raises:
        DataError: When the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--before {path}: cannot be read as JSON ({error})") from error
    metrics = content.get("metrics", content) if isinstance(content, dict) else None
    if not isinstance(metrics, dict) or not all(_is_number(v) for v in metrics.values()):
        raise DataError(
            f"--before {path}: holds no metrics; give a file that --output wrote, "
            'or {"recall@1": 0.1, ...}'
        )
    # A line of metrics.jsonl also says at which step it was measured.
    return {name.removeprefix("eval/"): v for name, v in metrics.items() if name != "step"}


def report(
    arguments: argparse.Namespace,
    config: Config,
    *,
    metrics: Mapping[str, float],
    before: Mapping[str, float] | None,
) -> dict[str, Any]:
    """What ``--output`` writes."""
    return {
        "model": str(arguments.model),
        "data_path": list(arguments.data_path),
        "retrieval_mode": config.data.retrieval_mode,
        "metrics": dict(metrics),
        **({"before": dict(before)} if before is not None else {}),
    }


def draw(
    path: str,
    dataset: PairDataset,
    judgments: Judgments,
    *,
    embeddings: tuple[Embeddings, Embeddings],
    metrics: Mapping[str, float],
) -> None:
    """Draw queries spread evenly over the data, chosen without looking at their results."""
    query_emb, corpus_emb = embeddings
    num_queries, num_documents = len(query_emb.values), len(corpus_emb.values)
    chosen = torch.linspace(0, num_queries - 1, min(PICTURE_ROWS, num_queries)).long()
    columns = min(PICTURE_COLUMNS, num_documents)
    chunk_size = query_chunk(num_documents)
    found = top_documents(query_emb.rows(chosen), corpus_emb, k=columns, chunk_size=chunk_size)
    rows = [
        _grid_row(dataset, judgments, query=query, documents=documents)
        for query, documents in zip(chosen.tolist(), found.tolist(), strict=True)
    ]
    name = max(
        (key for key in metrics if key.removeprefix("recall@").isdigit()),
        key=lambda key: int(key[7:]),
    )
    retrieval_grid(
        path,
        rows=rows,
        headline=f"{name.capitalize()}: {100 * metrics[name]:.1f} %",
        subtitle=f"{num_queries:,} queries, {num_documents:,} documents. "
        f"The {columns} best of each query, right ones framed green.",
    )


def _grid_row(
    dataset: PairDataset, judgments: Judgments, *, query: int, documents: Sequence[int]
) -> GridRow:
    results = [dataset.record(judgments.document_records[place]) for place in documents]
    return GridRow(
        query=_content(dataset.record(judgments.query_records[query]).query),
        results=[_content(record.positive) for record in results],
        relevant=[place in judgments.relevant[query] for place in documents],
    )


def _content(item: Item) -> Picture:
    if item.text is not None:
        return item.text
    assert item.image is not None  # one of the two, by construction
    return open_image(item.image, origin="picture")


def _load(paths: Sequence[str]) -> Any:
    """Prefers a validation split, as training does; errors name the flag of this command."""
    try:
        return load_table(paths, key="val_data_path")
    except DataError as error:
        raise DataError(str(error).replace("val_data_path", "--data_path")) from error


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    raise SystemExit(main())
