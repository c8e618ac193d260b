"""From the configuration to training and validation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets

from vembed_ds.config.datasets import dataset_name
from vembed_ds.config.distillation import teacher_entries
from vembed_ds.config.schema import Config, DataConfig, DatasetEntry
from vembed_ds.data.dataset import PairDataset, PairEncoder
from vembed_ds.data.fingerprint import fingerprint
from vembed_ds.data.images import first_missing_image
from vembed_ds.data.mixture import Mixture
from vembed_ds.data.order import Order
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.data.skipping import check_number, find_bad_records
from vembed_ds.data.streaming import PairStream, RowStream
from vembed_ds.distributed import comm
from vembed_ds.distributed.progress import watched
from vembed_ds.evaluation.measuring import check_cutoffs
from vembed_ds.evaluation.tasks import RetrievalTask, pairs_task
from vembed_ds.models.builder import ModelSpec
from vembed_ds.training.model_setup import setup_processor

ONLY = ""  # the name of the data when there is one data set


@dataclass(frozen=True)
class Source:
    """A table with the reader that understands its rows."""

    table: datasets.Dataset
    reader: RecordReader
    paths: Sequence[str]
    max_negatives: int | None = None


@dataclass(frozen=True)
class Validation:
    """Validation pairs, and which documents answer which queries."""

    dataset: PairDataset
    task: RetrievalTask


@dataclass(frozen=True)
class RunData:
    """The data of a run, and what turns it into model inputs.

    Attributes:
        processor: Encodes items.
        train: The training data, a table or a stream.
        order: Its global batches.
        fingerprint: Of the training data.
        val: Validation data by name of the data set.
        skipped: Messages of the records that are left out.
    """

    processor: ItemProcessor
    train: Mixture | PairStream
    order: Order | RowStream
    fingerprint: str
    val: dict[str, Validation] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def num_records(self) -> int | None:
        """Training records; ``None``: nobody has counted the stream."""
        return len(self.train) if isinstance(self.train, Mixture) else None

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; ``None`` for a stream."""
        return self.order.steps_per_epoch if isinstance(self.order, Order) else None

    @property
    def members(self) -> Sequence[PairEncoder]:
        """The training data sets."""
        return self.train.members if isinstance(self.train, Mixture) else [self.train]

    @property
    def tables(self) -> Sequence[PairDataset]:
        """The same, read whole; what needs that is refused for streams with the configuration."""
        assert isinstance(self.train, Mixture)
        return self.train.members


def setup_data(config: Config, spec: ModelSpec) -> RunData:
    """Processor, training and validation data, all checked. Collective."""
    entries = dataset_entries(config.data)
    sources = {
        name: open_source(entry, key=_key(name, "data_path"), teacher_scores=follows_scores(config))
        for name, entry in entries.items()
    }
    validation = open_validation(config)
    opened = [*sources.values(), *validation.values()]
    processor = setup_processor(config, spec, needed=[source.reader for source in opened])
    members, skipped = [], []
    for source in sources.values():
        member = build_dataset(source, processor=processor, config=config)
        member, messages = _usable(member, config.data)
        comm.require_equal(len(member), what=f"number of records in {source.reader.origin}")
        members.append(member)
        skipped += messages
    digests = [
        fingerprint(source.table.select_columns(source.reader.columns))
        for source in sources.values()
    ]
    mixed = config.data.batching == "mixed"
    train = Mixture(members, mixed=mixed)
    order = Order(
        [len(member) for member in members],
        weights=[entry.weight for entry in entries.values()],
        global_batch_size=config.training.batch_size * comm.world_size(),
        seed=config.training.seed,
        homogeneous=not mixed,
        keys=train.content_keys() if config.data.no_duplicates else None,
        names=[source.reader.origin for source in sources.values()],
    )
    if config.data.no_duplicates:
        order.batch(0)  # before a model is loaded: data of too few contents fails here
    return RunData(
        processor,
        train,
        order,
        fingerprint=digests[0] if len(digests) == 1 else "+".join(digests),
        val={
            name: setup_validation(source, processor=processor, config=config)
            for name, source in validation.items()
        },
        skipped=skipped,
    )


def open_validation(config: Config) -> dict[str, Source]:
    """The validation data by name of the data set.

    Raises:
        DataError: A file or its columns do not fit.
    """
    return {
        name: open_source(entry, key=_key(name, "val_data_path"))
        for name, entry in validation_entries(config.data).items()
    }


def dataset_entries(config: DataConfig) -> dict[str, DatasetEntry]:
    """The data sets of a run by name, with everything that they share filled in."""
    shared = {
        name: getattr(config, name)
        for name in (
            "image_root",
            "allow_images_outside_root",
            "allow_image_urls",
            "column_mapping",
            "retrieval_mode",
            "query_instruction",
            "document_instruction",
            "max_negatives",
        )
    }
    if not config.datasets:
        paths = {"data_path": config.data_path, "val_data_path": config.val_data_path}
        return {ONLY: DatasetEntry.model_validate(paths | shared)}
    filled = {}
    for place, entry in enumerate(config.datasets):
        own = {name: value for name, value in entry if value is not None}
        filled[dataset_name(entry, place)] = DatasetEntry.model_validate(shared | own)
    return filled


def follows_scores(config: Config) -> bool:
    """Whether a teacher's scores stand in the training data; validation data needs none."""
    return any(entry.scores for entry in teacher_entries(config.distillation))


def loader_timeout(config: Config) -> float:
    """Seconds to wait for a loader process: less than the other ranks wait for this one."""
    return config.data.loader_timeout_seconds or 30 * config.run.timeout_minutes


def open_source(entry: DatasetEntry, *, key: str, teacher_scores: bool = False) -> Source:
    """Open a data set's ``data_path`` or ``val_data_path`` memory-mapped.

    Args:
        entry: The data set.
        key: Which of the two; names errors.
        teacher_scores: Whether a teacher's scores are wanted.

    Raises:
        DataError: The file or its columns do not fit.
    """
    paths = data_paths(entry, key=key)
    table = load_table(paths, key=key)
    reader = build_reader(table.column_names, entry, paths=paths, teacher_scores=teacher_scores)
    return Source(table, reader, paths, entry.max_negatives)


def data_paths(entry: DatasetEntry, *, key: str) -> list[str]:
    """What ``key`` names: ``data_path`` or ``val_data_path``, which is given."""
    value = entry.val_data_path if key.endswith("val_data_path") else entry.data_path
    assert value is not None
    return [value] if isinstance(value, str) else list(value)


def build_reader(
    columns: Sequence[str],
    entry: DatasetEntry,
    *,
    paths: Sequence[str],
    teacher_scores: bool = False,
) -> RecordReader:
    """What turns the rows of a data set into records.

    Raises:
        DataError: The columns do not fit.
    """
    return RecordReader(
        columns,
        retrieval_mode=entry.retrieval_mode or "",
        column_mapping=entry.column_mapping or {},
        image_root=entry.image_root or "",
        origin=", ".join(paths),
        instructions={
            "query": entry.query_instruction or "",
            "positive": entry.document_instruction or "",
        },
        allow_images_outside_root=bool(entry.allow_images_outside_root),
        allow_image_urls=bool(entry.allow_image_urls),
        teacher_scores=teacher_scores,
    )


def build_dataset(source: Source, *, processor: ItemProcessor, config: Config) -> PairDataset:
    """The data set that encodes ``source``'s records."""
    return PairDataset(
        source.table,
        reader=source.reader,
        processor=processor,
        seed=config.training.seed,
        max_negatives=source.max_negatives,
    )


def validation_entries(config: DataConfig) -> dict[str, DatasetEntry]:
    """The data sets that have validation pairs, by name; those of the run have no name."""
    shared = config.model_copy(update={"datasets": (), "data_path": "."})
    entries = {ONLY: dataset_entries(shared)[ONLY], **dataset_entries(config)}
    return {name: entry for name, entry in entries.items() if entry.val_data_path is not None}


def setup_validation(source: Source, *, processor: ItemProcessor, config: Config) -> Validation:
    """Validation data, and what is to be found in them, checked. Collective.

    Raises:
        VembedError: On every rank.
    """
    dataset = build_dataset(source, processor=processor, config=config)
    check_records(dataset)
    comm.require_equal(len(dataset), what=f"number of records in {source.reader.origin}")
    task = pairs_task(dataset)
    check_cutoffs(config.run.eval_recall_k, num_documents=len(task.documents), origin=task.origin)
    return Validation(dataset, task)


def _key(name: str, key: str) -> str:
    return f"datasets[{name}].{key}" if name else key


def _usable(dataset: PairDataset, config: DataConfig) -> tuple[PairDataset, list[str]]:
    """The records to train on, and why the others are not. Collective."""
    if config.on_bad_record == "fail":
        check_records(dataset)
        return dataset, []
    bad = find_bad_records(dataset, num_threads=config.num_workers)
    origin = dataset.reader.origin
    check_number(bad, limit=config.max_bad_records, origin=origin, total=len(dataset))
    return dataset.without({record.row for record in bad}), [record.message for record in bad]


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
    rows = watched(mine, what=f"looking for images of {dataset.reader.origin}")
    if error := first_missing_image(dataset.record(row) for row in rows):
        raise error


def _holds_paths(dataset: PairDataset, column: str) -> bool:
    """Whether a column names files; reading every row of embedded images would take hours."""
    feature = dataset.table.features[column]
    feature = getattr(feature, "feature", feature)  # of a list of negatives
    return getattr(feature, "dtype", None) in ("string", "large_string")
