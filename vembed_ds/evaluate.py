"""Command: retrieval metrics of a model, as a table, JSON, Markdown and an HTML page."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from vembed_ds.command import Prepared, announce_rank, positive_number, run_on_ranks
from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import SECTION_OF, Config
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.errors import ConfigError, DataError, VembedError
from vembed_ds.evaluation.beir import is_beir
from vembed_ds.evaluation.comparison import Interval, paired_intervals
from vembed_ds.evaluation.earlier import Before, check_same_data, read_before
from vembed_ds.evaluation.embedding import Embed
from vembed_ds.evaluation.gallery import COLUMNS, ROWS, Gallery, draw
from vembed_ds.evaluation.html_report import check_html, write_html
from vembed_ds.evaluation.measuring import (
    Measured,
    Neighbours,
    check_cutoffs,
    measure,
    neighbours,
)
from vembed_ds.evaluation.opening import open_beir, open_pairs
from vembed_ds.evaluation.plots import check_matplotlib
from vembed_ds.evaluation.report import (
    INTERVAL_NOTE,
    Evaluation,
    check_writable,
    write_report,
    write_text,
)
from vembed_ds.evaluation.scoring import has_trec_eval
from vembed_ds.evaluation.tasks import RetrievalTask
from vembed_ds.inference import Encoder, embed_items, find_model
from vembed_ds.similarity import Embeddings

EPILOG = """\
data:
  pairs                as for training: every distinct positive is searched with every distinct query
  pairs and --corpus   the same among more documents
  pairs and --by_label documents of the query's class answer it; the query itself does not count
  a folder of BEIR     corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv with graded judgments

examples:
  vembed-ds evaluate --model output/model --data val.jsonl --html report.html
  vembed-ds evaluate --model output/model --data val.jsonl \\
      --config_override retrieval_mode=t2i eval_recall_k=[1,10] \\
      --output report.json --picture grid.png --before before.json
  vembed-ds evaluate --model output/model --compare openai/clip-vit-base-patch32 --data val.jsonl
  vembed-ds evaluate --model output/model --data datasets/scifact --split test
  vembed-ds evaluate --num_gpus 8 --model output/model --data datasets/nq

exit codes:
  0    done; with --dry_run: it could be done
  1    unexpected, or another rank died
  2    something is to be mended first; the message says what
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
PACKAGES = ("vembed-ds", "torch", "transformers", "numpy", "pytrec_eval-terrier")
TREC_NOTE = "nDCG and MAP are missing: pip install 'vembed-ds[evaluate]'"


@dataclass(frozen=True)
class Result:
    """A model, measured.

    Attributes:
        config: Settings of the evaluation.
        task: What was measured on.
        measured: How well; ``None`` in a dry run.
        settings: Content of the model's ``vembed_config.json``.
    """

    config: Config
    task: RetrievalTask
    measured: Measured | None
    settings: Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is printed on one line.
    """
    arguments = build_parser().parse_args(argv)
    announce_rank(arguments)
    transformers_logging.disable_progress_bar()
    if comm.world_size() > 1:
        return run_on_ranks(lambda: _prepare(arguments))
    try:
        sys.stdout.write(run(arguments) + "\n")
    except VembedError as error:
        sys.stderr.write(f"error: {'; '.join(str(error).splitlines())}\n")
        return 2
    return 0


def _prepare(arguments: argparse.Namespace) -> Prepared:
    def work() -> None:
        text = run(arguments)
        if comm.is_main():
            sys.stdout.write(text + "\n")

    return Prepared(arguments.timeout_minutes, work)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vembed-ds evaluate",
        description="Measure how well a model finds the right documents: Recall@k, MRR, nDCG, MAP. "
        "Every document of the corpus is compared, exactly.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="FOLDER",
        help="folder from vembed-ds convert, or any Hugging Face model to compare with",
    )
    add(
        "--data",
        "--data_path",
        dest="data_path",
        required=True,
        nargs="+",
        metavar="DATA",
        help="pairs to evaluate on, or one folder of BEIR",
    )
    add("--corpus", nargs="+", metavar="DATA", help="more documents, which answer no query")
    add("--split", help="with BEIR: which qrels; default: the only ones, or test")
    add("--by_label", action="store_true", help="documents of the query's class (label) answer it")
    add(
        "--ignore_queries_without_answers",
        action="store_true",
        help="leave out queries without a relevant document, and say how many",
    )
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
        type=positive_number,
        metavar="N",
        help="also measure the first N dimensions of the embeddings; default: the mrl_dims that are "
        "stored with the model",
    )
    _add_comparison(parser)
    _add_outputs(parser)
    add("--trust_remote_code", action="store_true", help="run Python code that the model brings")
    add("--timeout_minutes", type=float, default=30.0, help="longest wait of a rank for another")
    add("--local_rank", type=int, help="set by the DeepSpeed launcher")
    return parser


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--compare",
        metavar="MODEL",
        help="measure this model too; differences come with 95 %% confidence intervals",
    )
    group.add_argument(
        "--before",
        metavar="JSON",
        help="an earlier --output to compare with; written with --per_query, it gives intervals too",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", metavar="JSON", help="write the metrics to this file")
    add("--per_query", action="store_true", help="store the metrics of every query there too")
    add("--markdown", metavar="MD", help="write the table, settings and versions to this file")
    add(
        "--html", metavar="HTML", help="write a page with plots, examples and failures, in one file"
    )
    add("--picture", metavar="PNG", help="draw queries with their best documents")
    add(
        "--dry_run",
        action="store_true",
        help="read model and data, check where to write, and stop before anything is embedded",
    )


def run(arguments: argparse.Namespace) -> str:
    """Evaluate, and write what was asked for.

    Collective; only rank 0 writes.

    Returns:
        The table to print.

    Raises:
        VembedError: For everything that a user can put right.
    """
    check_flags(arguments)
    check_outputs(arguments)
    before = read_before(Path(arguments.before)) if arguments.before else None
    if arguments.compare:  # what cannot be found is said before the first model's work
        find_model(arguments.compare, trust_remote_code=arguments.trust_remote_code)
    result = evaluate_model(arguments, arguments.model, before=before)
    other: Result | None = None
    if arguments.compare:
        data = result.config.data
        shared = {
            key: getattr(data, key) for key in ("retrieval_mode", "column_mapping", "image_root")
        }
        other = evaluate_model(arguments, arguments.compare, shared=shared)
        before = None if other.measured is None else _as_before(other.task, other.measured)
    if result.measured is None:
        return _plan(arguments, result)
    evaluation = summary(arguments, result, measured=result.measured, before=before)
    if before is not None and not before.metrics.keys() & evaluation.metrics.keys():
        raise DataError(
            f"--before {arguments.before}: has {', '.join(before.metrics) or 'no metrics'}, none of "
            f"{', '.join(evaluation.metrics)}; give an --output of this command"
        )
    near = None
    if arguments.html or arguments.picture:
        number = min(COLUMNS, len(result.task.documents))
        near = neighbours(result.task, result.measured, number=number)
    comm.run_together(
        lambda: (
            _write(arguments, result, evaluation, near=near, other=other)
            if comm.is_main()
            else None
        ),
        doing="writing the results",
    )
    notes = [f"note: {note}" for note in evaluation.notes]
    notes += [f"written: {file}" for file in _files(arguments)]
    return "\n".join([evaluation.table, *([INTERVAL_NOTE] if evaluation.intervals else []), *notes])


def evaluate_model(
    arguments: argparse.Namespace,
    reference: str,
    *,
    shared: Mapping[str, Any] | None = None,
    before: Before | None = None,
) -> Result:
    """Load a model and measure it. Collective.

    Args:
        arguments: Of the command.
        reference: The model.
        shared: Settings that another model was measured with, and that this one is to share.
        before: An earlier evaluation, which must be of the same data.

    Raises:
        VembedError: For everything that a user can put right.
    """
    encoder = Encoder(reference, trust_remote_code=arguments.trust_remote_code)
    settings = {**encoder.settings, **(shared or {})}
    config = evaluation_config(arguments, reference, settings=settings)
    task = open_task(arguments, config=config, encoder=encoder)
    ks = config.run.eval_recall_k
    check_cutoffs(ks, num_documents=len(task.documents), origin=task.origin)
    if before is not None:
        check_same_data(before, task, path=arguments.before)
    dims = arguments.dims or encoder.settings.get("mrl_dims") or ()
    if arguments.dry_run:
        return Result(config, task, None, encoder.settings)
    device = next(encoder.model.parameters()).device
    measured = measure(
        task,
        embed=embed_with(encoder),
        ks=ks,
        dims=dims,
        batch_size=config.run.eval_batch_size or config.training.batch_size,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
        device=device,
    )
    return Result(config, task, measured, encoder.settings)


def evaluation_config(
    arguments: argparse.Namespace, reference: str, *, settings: Mapping[str, Any]
) -> Config:
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
    if is_beir(arguments.data_path[0]):  # which says itself what is what
        stored = {**stored, "retrieval_mode": "t2t", "column_mapping": {}}
        stored = {key: value for key, value in stored.items() if key not in given}
    if differing := [key for key, value in stored.items() if value is None]:
        raise ConfigError(
            f"{differing[0]}: {reference} was trained on data sets that differ in it; give "
            f"--config_override {differing[0]}=..."
        )
    if "retrieval_mode" not in {*stored, *given}:
        raise ConfigError(
            f"retrieval_mode: {reference} does not state one; give --config_override "
            "retrieval_mode=QUERY2POSITIVE, for example t2i"
        )
    values = {"model_name": str(reference), "data_path": list(arguments.data_path), **stored}
    origin = f"{reference}/vembed_config.json"
    return parse_config(values, origin=origin, overrides=arguments.config_override)


def open_task(arguments: argparse.Namespace, *, config: Config, encoder: Encoder) -> RetrievalTask:
    """The data, to be encoded for this model. Collective.

    Raises:
        ConfigError: When flags do not fit the data, or the model lacks a tower.
        DataError: When the data cannot be read.
    """
    data = config.data
    common: dict[str, Any] = {
        "processor": encoder.processor,
        "parts": encoder.model.parts,
        "leave_out_unanswered": arguments.ignore_queries_without_answers,
        "image_root": data.image_root,
        "allow_images_outside_root": data.allow_images_outside_root,
        "allow_image_urls": data.allow_image_urls,
        "instructions": {"query": data.query_instruction, "positive": data.document_instruction},
    }
    if is_beir(arguments.data_path[0]):
        given = any("retrieval_mode" in token for token in arguments.config_override)
        return open_beir(
            Path(arguments.data_path[0]),
            split=arguments.split,
            retrieval_mode=data.retrieval_mode if given else None,
            **common,
        )
    return open_pairs(
        arguments.data_path,
        corpus=arguments.corpus,
        by_label=arguments.by_label,
        retrieval_mode=data.retrieval_mode,
        column_mapping=data.column_mapping,
        **common,
    )


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that do not fit the data or each other.

    Raises:
        ConfigError: Naming the first.
    """
    first = arguments.data_path[0]
    beir = [path for path in arguments.data_path if is_beir(path)]
    if beir and len(arguments.data_path) > 1:
        raise ConfigError(f"--data {beir[0]}: a folder of BEIR stands alone; give one at a time")
    if not beir and arguments.split:
        raise ConfigError(
            f"--split {arguments.split}: {first} is no folder of BEIR, with {first}/corpus.jsonl, and "
            "has no splits; leave it out"
        )
    for flag in ("corpus", "by_label"):
        if beir and getattr(arguments, flag):
            raise ConfigError(
                f"--{flag}: a folder of BEIR says itself what answers what; leave it out"
            )
    if arguments.per_query and not arguments.output:
        raise ConfigError("--per_query: there is no --output to store the values in; give one")


def embed_with(encoder: Encoder) -> Embed:
    """The model's embedding of a batch."""

    def embed(items: Sequence[EncodedItem]) -> Embeddings:
        return embed_items(encoder.model, encoder.processor, items)

    return embed


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        ConfigError: A package is missing, or a path cannot be written.
    """
    if arguments.html:
        check_html(f"--html {arguments.html}")
    if arguments.picture:
        check_matplotlib(f"--picture {arguments.picture}")
    for flag in ("output", "markdown", "html", "picture"):
        if path := getattr(arguments, flag):
            check_writable(path, flag=f"--{flag}")


def summary(
    arguments: argparse.Namespace,
    result: Result,
    *,
    measured: Measured,
    before: Before | None,
) -> Evaluation:
    """What all reports tell."""
    task = result.task
    sizes = {"num_queries": len(task.queries), "num_documents": len(task.documents)}
    intervals: dict[str, Interval] = {}
    if before is not None and before.per_query is not None:
        intervals = paired_intervals(before.per_query, measured.values)
    return Evaluation(
        model=str(arguments.model),
        data=list(arguments.data_path),
        retrieval_mode=task.retrieval_mode,
        metrics={**measured.metrics, **sizes},
        before=None if before is None else before.metrics,
        before_name=arguments.compare or "before",
        intervals=intervals,
        notes=[*task.notes, *([] if has_trec_eval() else [TREC_NOTE])],
        fingerprint=task.fingerprint,
        settings=_settings(arguments, result),
        versions=_versions(),
        per_query=measured.values if arguments.per_query else None,
    )


def _as_before(task: RetrievalTask, measured: Measured) -> Before:
    sizes = {"num_queries": len(task.queries), "num_documents": len(task.documents)}
    return Before({**measured.metrics, **sizes}, measured.values, task.fingerprint)


def _settings(arguments: argparse.Namespace, result: Result) -> dict[str, Any]:
    data = result.config.data
    settings: dict[str, Any] = {
        "query_instruction": data.query_instruction,
        "document_instruction": data.document_instruction,
        "embedding width": None if result.measured is None else result.measured.query_emb.width,
        "ranks": comm.world_size(),
    }
    if arguments.corpus:
        settings["corpus"] = ", ".join(arguments.corpus)
    if arguments.by_label:
        settings["relevance"] = "documents of the query's class"
    return settings


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _plan(arguments: argparse.Namespace, result: Result) -> str:
    """What a dry run says."""
    task = result.task
    lines = [
        f"{arguments.model}: {len(task.queries):,} queries would search {len(task.documents):,} documents "
        f"of {task.origin} ({task.retrieval_mode}) on {comm.world_size()} rank(s)",
        *(f"would write {file}" for file in _files(arguments)),
        *(f"note: {note}" for note in task.notes),
    ]
    return "\n".join(lines)


def _files(arguments: argparse.Namespace) -> list[str]:
    """What is to be written."""
    found = (getattr(arguments, flag) for flag in ("output", "markdown", "html", "picture"))
    return [file for file in found if file]


def _write(
    arguments: argparse.Namespace,
    result: Result,
    evaluation: Evaluation,
    *,
    near: Neighbours | None,
    other: Result | None,
) -> None:
    if arguments.output:
        write_report(arguments.output, evaluation.payload)
    if arguments.markdown:
        write_text(arguments.markdown, evaluation.markdown)
    if near is None:
        return
    assert result.measured is not None
    gallery = Gallery(result.task, result.measured, near)
    if arguments.picture:
        draw(arguments.picture, gallery, metrics=evaluation.metrics)
    if arguments.html:
        earlier = None if other is None or other.measured is None else other.measured
        write_html(
            arguments.html,
            evaluation,
            gallery.charts(before=earlier),
            examples=[gallery.example(query) for query in gallery.spread(ROWS)],
            failures=[gallery.example(query, with_answer=True) for query in gallery.worst(ROWS)],
        )


if __name__ == "__main__":
    raise SystemExit(main())
