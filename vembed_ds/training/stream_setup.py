"""From the configuration to streamed training data, and the batches of either kind of data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from vembed_ds.config.schema import Config
from vembed_ds.data.dataset import Sample
from vembed_ds.data.mixture import Mixture
from vembed_ds.data.order import Order, permutation
from vembed_ds.data.sampler import GlobalBatchSampler
from vembed_ds.data.shards import first_columns, identity_of, open_shards
from vembed_ds.data.streaming import PairStream, RowStream, StreamBatches
from vembed_ds.data.workers import Keys
from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError
from vembed_ds.models.builder import ModelSpec
from vembed_ds.training.data_setup import (
    RunData,
    build_reader,
    data_paths,
    dataset_entries,
    follows_scores,
    open_validation,
    setup_validation,
)
from vembed_ds.training.model_setup import setup_processor

logger = logging.getLogger(__name__)


def setup_stream(config: Config, spec: ModelSpec) -> RunData:
    """Processor, streamed training data, and validation data, which is read whole. Collective.

    Of the training data only the head is read; what is wrong behind it shows when it is trained on.

    Raises:
        DataError: The data is missing, or its columns do not fit.
        DistributedError: The ranks do not see the same files.
    """
    ((name, entry),) = dataset_entries(config.data).items()
    key = f"datasets[{name}].data_path" if name else "data_path"
    shards = open_shards(data_paths(entry, key=key), key="data_path")
    columns = first_columns(shards)
    reader = build_reader(
        columns,
        entry,
        paths=data_paths(entry, key=key),
        teacher_scores=follows_scores(config),
    )
    validation = open_validation(config)
    processor = setup_processor(
        config, spec, needed=[reader, *(source.reader for source in validation.values())]
    )
    fingerprint = identity_of(shards)
    comm.require_equal(fingerprint, what=f"files of {reader.origin}")
    return RunData(
        processor,
        PairStream(
            [shard.name for shard in shards],
            reader=reader,
            processor=processor,
            seed=config.training.seed,
            max_negatives=entry.max_negatives,
        ),
        RowStream(
            shards,
            columns=columns,
            needed=reader.columns,
            global_batch_size=config.training.batch_size * comm.world_size(),
            seed=config.training.seed,
            buffer_size=config.data.shuffle_buffer,
        ),
        fingerprint=fingerprint,
        val={
            name: setup_validation(source, processor=processor, config=config)
            for name, source in validation.items()
        },
    )


def training_batches(
    data: RunData,
    *,
    num_steps: int,
    start_step: int,
    timeout_seconds: float,
    interrupted: Callable[[], bool],
) -> Iterable[Keys]:
    """What this rank trains on, step by step from ``start_step`` on.

    Args:
        data: The data of the run.
        num_steps: Steps of the whole run.
        start_step: Steps already made.
        timeout_seconds: Longest wait for a batch of a stream.
        interrupted: Whether the batch is not wanted any more.
    """
    steps = {"num_steps": num_steps, "start_step": start_step}
    ranks = {"rank": comm.rank(), "world_size": comm.world_size()}
    if isinstance(data.order, Order):
        return GlobalBatchSampler(data.order, **ranks, **steps)
    if start_step:
        consumed = start_step * data.order.global_batch_size
        logger.info(
            "streaming: %d records were consumed by %d steps; they are read again and skipped",
            consumed,
            start_step,
        )
    return StreamBatches(
        data.order, **ranks, **steps, timeout_seconds=timeout_seconds, interrupted=interrupted
    )


def some_samples(data: RunData, *, number: int) -> list[Sample | VembedError]:
    """``number`` samples of this rank, not augmented; other ranks have others where there are enough.

    Of a table from all over it, because neighbours in a file are often alike; of a stream the first.
    """
    mine = range(comm.rank() * number, (comm.rank() + 1) * number)
    if isinstance(data.train, Mixture):
        order = permutation(len(data.train), [0, 0])
        return [data.train[int(order[place % len(order)])] for place in mine]
    assert isinstance(data.order, RowStream)
    try:
        rows = data.order.head(comm.world_size() * number)
    except VembedError as error:
        return [error]
    return [data.train[rows[place % len(rows)]] for place in mine]
