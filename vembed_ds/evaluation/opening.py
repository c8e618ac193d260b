"""From files to a retrieval task for a certain model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.distributed import comm
from vembed_ds.errors import ConfigError, DataError
from vembed_ds.evaluation.beir import beir_task
from vembed_ds.evaluation.items import corpus_columns, open_items
from vembed_ds.evaluation.tasks import RetrievalTask, pairs_task


def open_pairs(
    paths: Sequence[str],
    *,
    corpus: Sequence[str] | None,
    by_label: bool,
    retrieval_mode: str,
    column_mapping: Mapping[str, str],
    processor: ItemProcessor,
    parts: Collection[str],
    leave_out_unanswered: bool,
    **options: Any,
) -> RetrievalTask:
    """Pairs, and further documents, to be encoded for a model. Collective.

    Args:
        paths: The pairs.
        corpus: Further documents.
        by_label: As of :func:`vembed_ds.evaluation.tasks.pairs_task`.
        retrieval_mode: What searches what.
        column_mapping: Role to column.
        processor: Encodes items.
        parts: What the model embeds: ``text``, ``image``.
        leave_out_unanswered: As of ``pairs_task``.
        options: Further ones of :class:`RecordReader`.

    Raises:
        ConfigError: The model lacks a tower for the retrieval mode.
        DataError: The data cannot be read.
    """
    table = _load(paths, flag="--data")
    reader = RecordReader(
        table.column_names,
        retrieval_mode=retrieval_mode,
        column_mapping=column_mapping,
        origin=", ".join(paths),
        **options,
    )
    for part in sorted(reader.parts - set(parts)):
        _refuse_part(part, reader.columns_of(part)[0][0], mode=retrieval_mode, parts=parts)
    pairs = PairDataset(table, reader=reader, processor=processor, seed=0)
    more = None
    if corpus:
        rows = _load(corpus, flag="--corpus")
        more = open_items(
            rows,
            letter=reader.letters["positive"],
            columns=corpus_columns(reader, rows.column_names),
            origin=", ".join(corpus),
            processor=processor,
            **options,
        )
    return pairs_task(
        pairs, corpus=more, by_label=by_label, leave_out_unanswered=leave_out_unanswered
    )


def open_beir(
    folder: Path,
    *,
    split: str | None,
    retrieval_mode: str | None,
    processor: ItemProcessor,
    parts: Collection[str],
    leave_out_unanswered: bool,
    **options: Any,
) -> RetrievalTask:
    """A folder of BEIR, to be encoded for a model; arguments as of :func:`open_pairs`.

    Args:
        folder: The folder.
        split: Which qrels.
        retrieval_mode: What the user believes that it holds; ``None``: no matter what.
        processor: Encodes items.
        parts: What the model embeds.
        leave_out_unanswered: Leave out queries without a relevant document.
        options: Further ones of :class:`RecordReader`.

    Raises:
        ConfigError: It holds something else, or the model lacks a tower for it.
        DataError: The data cannot be read.
    """
    task: RetrievalTask = _main_first(
        lambda: beir_task(
            folder,
            split=split,
            processor=processor,
            leave_out_unanswered=leave_out_unanswered,
            **options,
        )
    )
    mode = task.retrieval_mode
    if retrieval_mode not in (None, mode):
        raise ConfigError(
            f"retrieval_mode={retrieval_mode}: {folder} holds {mode}; leave retrieval_mode out"
        )
    for role, items in (("query", task.queries), ("document", task.documents)):
        for part in sorted(items.parts - set(parts)):
            _refuse_part(part, role, mode=mode, parts=parts)
    return task


def _refuse_part(part: str, role: str, *, mode: str, parts: Collection[str]) -> None:
    raise ConfigError(
        f"retrieval_mode={mode}: the {role} is {part}, but the model embeds {' and '.join(parts)}; "
        "choose another mode, or other data"
    )


def _load(paths: Sequence[str], *, flag: str) -> datasets.Dataset:
    """Prefers a validation split, as training does; errors name the flag of the command."""
    try:
        found: datasets.Dataset = _main_first(lambda: load_table(paths, key="val_data_path"))
    except DataError as error:
        raise DataError(str(error).replace("val_data_path", flag)) from error
    return found


def _main_first(read: Any) -> Any:
    """Rank 0 converts files that the others then find in the cache. Collective."""
    found = comm.run_together(lambda: read() if comm.is_main() else None, doing="reading data")
    if comm.world_size() == 1:
        return found
    return comm.run_together(lambda: found if comm.is_main() else read(), doing="reading data")
