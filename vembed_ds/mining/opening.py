"""Models and data of the command line, opened and compared with each other."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import datasets
from transformers.utils import logging as transformers_logging

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.records import RecordReader
from vembed_ds.encoding.items import (
    ROLES,
    ItemColumns,
    ItemTable,
    choose_columns,
    load_items,
    role_instruction,
)
from vembed_ds.errors import ConfigError
from vembed_ds.inference import Encoder
from vembed_ds.mining.output import check_output
from vembed_ds.mining.vectors import Model

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


def open_all(arguments: argparse.Namespace) -> Opened:
    """Read what the command line names. Not collective: each rank reads for itself.

    Args:
        arguments: Of ``vembed_ds.mine``.

    Raises:
        VembedError: Something is missing, cannot be read, or does not fit.
    """
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

    for part in sorted(dataset.reader.parts - set(encoder.model.parts)):
        role, _ = dataset.reader.columns_of(part)[0]
        raise ConfigError(
            f"{name}: retrieval_mode={dataset.reader.retrieval_mode}: the {role} is {part}, but the model "
            f"embeds {' and '.join(encoder.model.parts)}; choose another mode or model"
        )


def _open_corpus(arguments: argparse.Namespace, dataset: PairDataset) -> ItemTable:
    """Documents that are read as the positives are."""
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

    found = {}
    for role in ROLES:
        key = f"{flag}{role}_instruction"
        given = getattr(arguments, key.removeprefix("--"))
        found[role] = role_instruction(encoder.settings, role, flag=key) if given is None else given
    return Model(encoder, found["query"], found["document"], name)
