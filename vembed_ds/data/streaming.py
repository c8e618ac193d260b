"""Training on data that is read row by row: the order of its rows, and this rank's share.

The order is a pure function of (data, seed, epoch), as in :mod:`vembed_ds.data.order`. Every rank reads
all rows and keeps its share of each global batch, so that neither ranks nor workers decide which
row is in which batch.
"""

from __future__ import annotations

import copy
import itertools
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vembed_ds.data.columns import Part
from vembed_ds.data.dataset import PairEncoder, Sample
from vembed_ds.data.order import permutation
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import RecordReader
from vembed_ds.data.sampler import ROW_BITS, StreamedRow, rank_slice
from vembed_ds.data.shards import Shard, numbered_rows
from vembed_ds.data.waiting import never, take
from vembed_ds.errors import DataError, VembedError

AHEAD = 2  # batches that the thread reads ahead; what they hold is this rank's share only
PATIENCE_SECONDS = 0.5  # until the thread looks whether anybody still wants its batches


class RowStream:
    """The rows of all epochs, shuffled, cut into global batches.

    Shards come in another order in every epoch, one behind the other; a buffer then mixes the rows.
    Data that fits into the buffer has the very order of a table that is read whole. As there,
    what is left of an epoch behind its last whole batch is dropped.

    Args:
        shards: The data.
        columns: The columns that rows may have.
        needed: Those that are kept.
        global_batch_size: Rows per step over all ranks.
        seed: Run seed, >= 0.
        buffer_size: Rows among which the next one is drawn, > 0; 1 keeps the order of each shard.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        columns: Sequence[str],
        needed: Sequence[str],
        global_batch_size: int,
        seed: int,
        buffer_size: int,
    ) -> None:
        self.shards, self.columns, self.needed = list(shards), list(columns), list(needed)
        self.global_batch_size = global_batch_size
        self.seed, self.buffer_size = seed, buffer_size

    def head(self, number: int) -> list[StreamedRow]:
        """The first rows as they stand in the data, at most ``number``.

        Raises:
            DataError: They cannot be read.
        """
        return list(itertools.islice(self._in_order(range(len(self.shards)), epoch=0), number))

    def epoch(self, epoch: int) -> Iterator[StreamedRow]:
        """All rows in the order of an epoch.

        Raises:
            DataError: A shard cannot be read.
        """
        places = permutation(len(self.shards), [self.seed, epoch, 0, 2])
        return _shuffled(
            self._in_order(places.tolist(), epoch=epoch),
            size=self.buffer_size,
            words=[self.seed, epoch],
        )

    def batches(self, share: range, *, start_step: int = 0) -> Iterator[list[StreamedRow]]:
        """One rank's rows of every global batch; goes on over epochs and never ends.

        A resumed run reads again what it has consumed: the first epoch up to the step, or, where the
        step is behind that, once for its length and then the step's own epoch.

        Args:
            share: Places in the global batch.
            start_step: First step that is wanted.

        Yields:
            Rows; an empty list for every batch that is skipped, as a sign of life.

        Raises:
            DataError: A shard cannot be read, or all rows do not fill a batch.
        """
        epoch, skip = 0, start_step
        while True:
            number = 0
            for batch in self._cut(self.epoch(epoch), share):
                yield batch if number >= skip else []
                number += 1
            if skip < number:
                epoch, skip = epoch + 1, 0
            else:  # the first epoch of a resumed run, whose length is now known
                epoch, skip = divmod(start_step, number)

    def _in_order(self, places: Iterable[int], *, epoch: int) -> Iterator[StreamedRow]:
        for place in places:
            rows = numbered_rows(self.shards[place], columns=self.columns, needed=self.needed)
            for number, values in rows:
                yield StreamedRow(place, number, epoch, values)

    def _cut(self, rows: Iterable[StreamedRow], share: range) -> Iterator[list[StreamedRow]]:
        """Our rows of each whole batch."""
        mine: list[StreamedRow] = []
        total = 0
        for total, row in enumerate(rows, start=1):
            place = (total - 1) % self.global_batch_size
            if place in share:
                mine.append(row)
            if place == self.global_batch_size - 1:
                yield mine
                mine = []
        if total < self.global_batch_size:
            raise DataError(
                f"{total} records do not fill one global batch of {self.global_batch_size} "
                "(batch_size x ranks); lower batch_size, use fewer ranks or add data"
            )


def _shuffled(
    rows: Iterator[StreamedRow], *, size: int, words: Sequence[int]
) -> Iterator[StreamedRow]:
    """Draws each row from a buffer that the next one fills up.

    Not the library's ``IterableDataset.shuffle``: its order changes with its release, and its rows
    have no numbers.
    """
    buffer = list(itertools.islice(rows, size))
    draws = _raw_numbers([*words, 0, 3])
    fits = True
    for row in rows:
        place = next(draws) % size
        yield buffer[place]
        buffer[place], fits = row, False
    if fits:
        buffer.sort(key=lambda row: row.index)  # whatever the order of the shards was
    for place in permutation(len(buffer), words):
        yield buffer[place]


def _raw_numbers(words: Sequence[int]) -> Iterator[int]:
    generator = np.random.PCG64(np.random.SeedSequence(list(words)))
    while True:
        yield from generator.random_raw(1024).tolist()


class StreamBatches:
    """This rank's share of each global batch, read a little ahead by a thread.

    The thread that trains never waits for a file without limit; an error arrives as a batch, on
    which the ranks agree as on any other.

    Args:
        stream: The rows.
        rank: This rank.
        world_size: Number of ranks.
        num_steps: Steps of the whole run.
        start_step: First step yielded; a resumed run passes the steps already made.
        timeout_seconds: Longest wait for a batch, also for one that a resumed run skips.
        interrupted: Whether the batch is not wanted any more; asked while waiting for it.
            Iterating then raises :class:`WaitInterrupted`.

    Raises:
        ConfigError: When the ranks do not divide the global batch.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        rank: int,
        world_size: int,
        num_steps: int,
        start_step: int = 0,
        timeout_seconds: float,
        interrupted: Callable[[], bool] = never,
    ) -> None:
        self.stream = stream
        self.share: range = rank_slice(
            range(stream.global_batch_size), rank=rank, world_size=world_size
        )
        self.steps = range(start_step, num_steps)
        self.timeout_seconds, self.interrupted = timeout_seconds, interrupted

    def __iter__(self) -> Iterator[list[StreamedRow]]:
        """Yields one list of rows per step; ends behind an error."""
        ready: queue.Queue[list[StreamedRow]] = queue.Queue(AHEAD)
        unwanted = threading.Event()
        batches = self.stream.batches(self.share, start_step=self.steps.start)
        threading.Thread(
            target=_fill, args=(batches, ready, unwanted), name="stream reader", daemon=True
        ).start()
        try:
            for _ in self.steps:
                while not (batch := self._next(ready)):
                    pass  # one that is skipped
                yield batch
                if isinstance(batch[0].values, VembedError):
                    return
        finally:
            unwanted.set()

    def _next(self, ready: queue.Queue[list[StreamedRow]]) -> list[StreamedRow]:
        try:
            return take(ready, timeout_seconds=self.timeout_seconds, interrupted=self.interrupted)
        except queue.Empty:
            return _failed(
                f"streaming: no batch was read for {self.timeout_seconds:g} s; is a file system or "
                "the network stuck, or loader_timeout_seconds too short?"
            )


def _fill(
    batches: Iterator[list[StreamedRow]],
    ready: queue.Queue[list[StreamedRow]],
    unwanted: threading.Event,
) -> None:
    """The life of the thread: reads until nobody wants more, or an error."""
    try:
        for batch in batches:
            _put(batch, ready, unwanted)
            if unwanted.is_set():
                return
    except VembedError as error:
        _put(_failed(str(error)), ready, unwanted)
    except Exception:  # noqa: BLE001 (the training thread reports it, on every rank)
        _put(_failed(f"reading the stream failed:\n{traceback.format_exc()}"), ready, unwanted)


def _put(
    batch: list[StreamedRow], ready: queue.Queue[list[StreamedRow]], unwanted: threading.Event
) -> None:
    while not unwanted.is_set():
        try:
            ready.put(batch, timeout=PATIENCE_SECONDS)
        except queue.Full:
            continue
        return


def _failed(message: str) -> list[StreamedRow]:
    return [StreamedRow(0, 0, 0, DataError(message))]


class PairStream(PairEncoder, Dataset[Sample | VembedError]):
    """Encodes streamed rows, here or in a worker.

    Args:
        names: Of the shards, for messages.
        reader: Turns rows into records.
        processor: Encodes items.
        seed: Run seed, >= 0; seeds augmentation together with epoch, shard, row and role.
        max_negatives: Most negatives of one record; ``None``: all.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        reader: RecordReader,
        processor: ItemProcessor,
        seed: int,
        max_negatives: int | None = None,
    ) -> None:
        super().__init__(reader=reader, processor=processor, seed=seed, max_negatives=max_negatives)
        self._names = list(names)

    @property
    def parts(self) -> set[Part]:
        """Whether any record may hold a text, an image, or both."""
        return self.reader.parts

    def locate(self, index: int) -> tuple[str, int]:
        """Name of the shard, and number of the row in it, of ``StreamedRow.index``."""
        return self._names[index >> ROW_BITS], index % (1 << ROW_BITS)

    def __getitem__(self, row: Any) -> Sample | VembedError:
        """Encodes one :class:`StreamedRow`; an error is returned, as by :class:`PairDataset`."""
        assert isinstance(row, StreamedRow)
        if isinstance(row.values, VembedError):
            return row.values
        reader = copy.copy(self.reader)
        reader.origin = self._names[row.shard]
        try:
            return self.encode(
                reader.read(row.values, row.number),
                index=row.index,
                number=row.index,
                epoch=row.epoch,
                origin=f"{reader.origin}, record {row.number}",
            )
        except VembedError as error:
            return error
