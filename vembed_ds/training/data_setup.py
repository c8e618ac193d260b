"""From the configuration to training and validation data."""

from __future__ import annotations

from dataclasses import dataclass

import datasets

from vembed_ds.config.schema import Config, DataConfig
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.fingerprint import fingerprint
from vembed_ds.data.images import first_missing_image
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.distributed import comm
from vembed_ds.evaluation.retrieval import Judgments, check_recall_k, read_judgments
from vembed_ds.models.builder import ModelSpec
from vembed_ds.training.model_setup import setup_processor


@dataclass(frozen=True)
class Source:
    """A table with the reader that understands its rows."""

    table: datasets.Dataset
    reader: RecordReader


@dataclass(frozen=True)
class RunData:
    """The data of a run, and what turns it into model inputs."""

    processor: ItemProcessor
    train: PairDataset
    fingerprint: str
    val: PairDataset | None = None
    judgments: Judgments | None = None


def setup_data(config: Config, spec: ModelSpec) -> RunData:
    """Processor, training and validation data, all checked. Collective."""
    train_source = open_source(config.data, key="data_path")
    val_source = open_source(config.data, key="val_data_path")
    assert train_source is not None  # data_path is required
    processor = setup_processor(config, spec, needed=train_source.reader)
    train_data = build_dataset(train_source, processor=processor, config=config)
    check_records(train_data)
    comm.require_equal(len(train_data), what="number of records in data_path")
    digest = fingerprint(train_data.table)
    if val_source is None:
        return RunData(processor, train_data, digest)
    val_data = build_dataset(val_source, processor=processor, config=config)
    check_records(val_data)
    comm.require_equal(len(val_data), what="number of records in val_data_path")
    judgments = read_judgments(val_data)
    check_recall_k(config.run.eval_recall_k, judgments=judgments, origin=val_source.reader.origin)
    return RunData(processor, train_data, digest, val_data, judgments)


def open_source(config: DataConfig, *, key: str) -> Source | None:
    """Open ``data_path`` or ``val_data_path`` memory-mapped; ``None`` when it is not set.

    Raises:
        DataError: The file or its columns do not fit.
    """
    value = getattr(config, key)
    if value is None:
        return None
    paths = [value] if isinstance(value, str) else list(value)
    table = load_table(paths, key=key)
    reader = RecordReader(
        table.column_names,
        retrieval_mode=config.retrieval_mode,
        column_mapping=config.column_mapping,
        image_root=config.image_root,
        origin=", ".join(paths),
        instructions={
            "query": config.query_instruction,
            "positive": config.document_instruction,
        },
    )
    return Source(table, reader)


def build_dataset(source: Source, *, processor: ItemProcessor, config: Config) -> PairDataset:
    """The data set that encodes ``source``'s records."""
    return PairDataset(
        source.table,
        reader=source.reader,
        processor=processor,
        seed=config.training.seed,
        max_negatives=config.data.max_negatives,
    )


def check_records(dataset: PairDataset) -> None:
    """Find images that do not exist before a model is loaded; each rank looks at its share.

    Collective.

    Raises:
        DataError: On every rank, naming the first record without its image.
    """
    if any(_holds_paths(dataset, column) for _, column in dataset.reader.columns_of("image")):
        comm.run_together(lambda: _find_missing(dataset), doing="looking for images")


def _find_missing(dataset: PairDataset) -> None:
    mine = range(comm.rank(), len(dataset), comm.world_size())
    if error := first_missing_image(dataset.record(index) for index in mine):
        raise error


def _holds_paths(dataset: PairDataset, column: str) -> bool:
    """Whether a column names files; reading every row of embedded images would take hours."""
    feature = dataset.table.features[column]
    feature = getattr(feature, "feature", feature)  # of a list of negatives
    return getattr(feature, "dtype", None) in ("string", "large_string")
