"""The order of a stream: from data, seed and epoch alone; and its records, encoded."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vembed_ds.data import streaming
from vembed_ds.data.augment import ImageAugmentation
from vembed_ds.data.collators import Batch
from vembed_ds.data.dataset import PairDataset, Sample
from vembed_ds.data.loader import BatchLoader
from vembed_ds.data.order import Order
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.data.sampler import SampleKey, StreamedRow
from vembed_ds.data.shards import Shard, first_columns, open_shards
from vembed_ds.data.streaming import PairStream, RowStream, StreamBatches
from vembed_ds.errors import ConfigError, DataError

Noise = Callable[..., Image.Image]
NUM_RECORDS = 12


def shard(number: int, size: int) -> Shard:
    def rows(_needed: object) -> Iterator[dict[str, Any]]:
        return ({"text": f"{number}:{place}"} for place in range(size))

    return Shard(f"shard {number}", rows, lambda: str(number))


def stream(*sizes: int, batch: int = 4, seed: int = 5, buffer: int = 1000) -> RowStream:
    return RowStream(
        [shard(number, size) for number, size in enumerate(sizes)],
        columns=["text"],
        needed=["text"],
        global_batch_size=batch,
        seed=seed,
        buffer_size=buffer,
    )


def texts(rows: Any) -> list[str]:
    return [row.values["text"] for row in rows]


def indices(rows: Any) -> list[int]:
    return [row.index for row in rows]


def batches(rows: RowStream, number: int, **options: int) -> list[list[StreamedRow]]:
    share = range(rows.global_batch_size)
    return list(itertools.islice(filter(None, rows.batches(share, **options)), number))


def test_data_that_fits_into_the_buffer_has_the_order_of_a_table() -> None:
    order = Order([23], global_batch_size=4, seed=5)
    found = batches(stream(23, buffer=23), 12)
    assert [indices(batch) for batch in found] == [
        order.batch(step)[1].tolist() for step in range(12)
    ]
    assert [batch[0].epoch for batch in found] == [0] * 5 + [1] * 5 + [2] * 2
    # Several files too, whatever the order in which they were read.
    place = {f"{n}:{p}": 7 * n + p for n in range(4) for p in range(7)}
    order = Order([28], global_batch_size=4, seed=5)
    several = [[place[text] for text in texts(b)] for b in batches(stream(7, 7, 7, 7), 14)]
    assert several == [order.batch(step)[1].tolist() for step in range(14)]


@pytest.mark.parametrize("buffer", [1, 3, 10, 29, 30, 100])
def test_an_epoch_has_every_row_once(buffer: int) -> None:
    rows = stream(11, 1, 18, buffer=buffer)
    for epoch in range(3):
        assert sorted(indices(rows.epoch(epoch))) == sorted(
            (number << 40) + place
            for number, size in enumerate((11, 1, 18))
            for place in range(size)
        )


def test_the_buffer_bounds_how_early_a_row_comes() -> None:
    found = indices(stream(500, buffer=50).epoch(0))
    early = [row - place for place, row in enumerate(found)]
    assert max(early) < 50
    assert np.corrcoef(range(500), found)[0, 1] < 0.99  # and they do move
    assert indices(stream(20, buffer=1).epoch(0)) == list(range(20))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(seed: int, epoch: int) -> tuple[str, ...]:
        return tuple(texts(stream(20, 20, 20, buffer=8, seed=seed).epoch(epoch)))

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert orders == [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    first_shards = {order(0, epoch)[0][0] for epoch in range(10)}
    assert first_shards == {"0", "1", "2"}


def test_the_order_is_written_down() -> None:
    # A change would alter every run that is resumed.
    assert texts(stream(5, 5, buffer=3, seed=42).epoch(1)) == PINNED


PINNED = ["0:2", "0:3", "0:1", "1:0", "1:1", "1:2", "1:3", "1:4", "0:4", "0:0"]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shares_of_the_ranks_make_the_batches_of_one(world_size: int) -> None:
    def run(rank: int, world: int) -> list[list[int]]:
        found = StreamBatches(
            stream(9, 14, buffer=6), rank=rank, world_size=world, num_steps=13, timeout_seconds=60
        )
        return [indices(batch) for batch in found]

    shares = [run(rank, world_size) for rank in range(world_size)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == run(0, 1)


def test_ranks_must_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match="3 ranks do not divide it"):
        StreamBatches(stream(9), rank=0, world_size=3, num_steps=1, timeout_seconds=60)


@pytest.mark.parametrize("sizes", [(23,), (9, 14), (8, 8)])
def test_a_resumed_stream_continues(sizes: tuple[int, ...]) -> None:
    rows = stream(*sizes, buffer=6)
    whole = batches(rows, 20)
    for start in range(20):
        assert batches(rows, 20 - start, start_step=start) == whole[start:]


def test_every_skipped_batch_is_a_sign_of_life() -> None:
    rows = stream(23, buffer=6)  # five batches an epoch
    found = list(itertools.islice(rows.batches(range(4), start_step=7), 9))
    # The first epoch whole, for its length; then two of the second, in which step 7 is the third.
    assert [len(batch) for batch in found] == [0] * 5 + [0] * 2 + [4] * 2


def test_the_incomplete_last_batch_of_an_epoch_is_dropped() -> None:
    found = batches(stream(11, buffer=6), 4)
    assert [batch[0].epoch for batch in found] == [0, 0, 1, 1]
    assert len({row.index for batch in found[:2] for row in batch}) == 8


def test_data_that_fills_no_batch_is_refused() -> None:
    with pytest.raises(DataError, match="3 records do not fill one global batch of 4"):
        batches(stream(1, 2), 1)


def test_an_error_arrives_as_the_last_batch() -> None:
    rows = stream(9)
    rows.shards.append(Shard("broken", lambda _: iter([{"other": 1}]), lambda: ""))
    rows.buffer_size = 1
    found = list(StreamBatches(rows, rank=1, world_size=2, num_steps=50, timeout_seconds=60))
    assert len(found) < 5
    (last,) = found[-1]
    assert "broken, record 0: the column 'other' is not among those" in str(last.values)


def test_a_defect_arrives_with_its_trace() -> None:
    rows = stream(9)
    rows.shards = [Shard("broken", lambda _: iter([1 / 0]), lambda: "")]  # type: ignore[list-item]
    ((row,),) = StreamBatches(rows, rank=0, world_size=1, num_steps=5, timeout_seconds=60)
    assert "ZeroDivisionError" in str(row.values)


def test_a_stuck_file_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def stuck(_needed: object) -> Iterator[dict[str, Any]]:
        done.wait(60)
        yield {"text": "late"}

    rows = stream(9)
    rows.shards = [Shard("stuck", stuck, lambda: "")]
    ((row,),) = StreamBatches(rows, rank=0, world_size=1, num_steps=5, timeout_seconds=0.2)
    done.set()
    assert "no batch was read for 0.2 s; is a file system or the network stuck" in str(row.values)


def test_the_thread_reads_a_little_ahead_and_ends_with_the_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "PATIENCE_SECONDS", 0.05)
    read: list[int] = []

    def rows(_needed: object) -> Iterator[dict[str, Any]]:
        for place in range(1000):
            read.append(place)
            yield {"text": str(place)}

    endless = stream(9, buffer=1)
    endless.shards = [Shard("long", rows, lambda: "")]
    iterator = iter(StreamBatches(endless, rank=0, world_size=1, num_steps=200, timeout_seconds=60))
    next(iterator)
    time.sleep(0.3)
    # The batch we have, those in the queue, one that waits to be put, and the buffer's row.
    assert len(read) <= 4 * (1 + streaming.AHEAD + 1) + 1
    iterator.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while any(t.name == "stream reader" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path, noise: Noise) -> Path:
    rows = []
    for index in range(NUM_RECORDS):
        noise(index).save(tmp_path / f"{index}.png")
        negatives = [f"{place}.png" for place in range(index % 4)]
        rows.append(
            {"caption": f"picture {index}", "image": f"{index}.png", "negative_images": negatives}
        )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def reader_of(folder: Path, columns: list[str]) -> RecordReader:
    return RecordReader(
        columns,
        retrieval_mode="t2i",
        column_mapping={},
        image_root=str(folder),
        origin="train.jsonl",
    )


def opened(
    folder: Path, minilm: str, image_settings: dict[str, Any], *, buffer: int = 1000
) -> tuple[PairStream, RowStream]:
    shards = open_shards([str(folder / "train.jsonl")], key="data_path")
    columns = first_columns(shards)
    reader = reader_of(folder, columns)
    augmentation = ImageAugmentation([{"RandomAffine": {"degrees": 20, "p": 1.0}}])
    processor = build_item_processor(
        minilm, image_settings, max_length=12, augmentation=augmentation
    )
    pairs = PairStream(
        [s.name for s in shards], reader=reader, processor=processor, seed=1, max_negatives=2
    )
    rows = RowStream(
        shards,
        columns=columns,
        needed=reader.columns,
        global_batch_size=4,
        seed=1,
        buffer_size=buffer,
    )
    return pairs, rows


def content(batches: list[Batch]) -> list[Any]:
    return [
        (batch.indices, batch.keys, batch.negative_counts, role, name, array.tolist())
        for batch in batches
        for role, items in batch.roles.items()
        for item in items
        for name, array in item.inputs.items()
    ]


def loaded(pairs: PairStream, rows: RowStream, *, num_workers: int = 0, **more: int) -> list[Batch]:
    ranks = {"rank": 0, "world_size": 1, "num_steps": 7} | more
    found = StreamBatches(rows, timeout_seconds=60, **ranks)
    return list(BatchLoader(pairs, found, num_workers=num_workers, prefetch_factor=2))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.one_in(2)
def test_results_do_not_depend_on_the_workers(
    folder: Path, minilm: str, image_settings: dict[str, Any], num_workers: int
) -> None:
    pytest.importorskip("kornia")
    pairs, rows = opened(folder, minilm, image_settings, buffer=5)
    expected = content(loaded(pairs, rows))
    assert len({tuple(entry[0]) for entry in expected}) == 7
    assert content(loaded(pairs, rows, num_workers=num_workers)) == expected
    # A resumed run, and the shares of two ranks.
    rest = content(loaded(pairs, rows, num_workers=num_workers, start_step=4))
    assert rest == [entry for entry in expected if entry[0] in [e[0] for e in rest]]
    second = loaded(pairs, rows, num_workers=num_workers, rank=1, world_size=2)
    assert [batch.indices for batch in second] == [
        batch.indices[2:] for batch in loaded(pairs, rows)
    ]


def test_a_row_is_found_again_by_its_number(
    folder: Path, minilm: str, image_settings: dict[str, Any]
) -> None:
    pytest.importorskip("kornia")
    pairs, _ = opened(folder, minilm, image_settings)
    row = StreamedRow(0, 7, 2, {})
    assert pairs.locate(row.index) == (str(folder / "train.jsonl"), 7)
    several = PairStream(["a", "b"], reader=pairs.reader, processor=pairs.processor, seed=1)
    assert several.locate(StreamedRow(1, 3, 0, {}).index) == ("b", 3)


def test_samples_are_those_of_the_table(
    folder: Path, minilm: str, image_settings: dict[str, Any]
) -> None:
    """Pixels, augmentation and drawn negatives: a short stream is the table, value by value."""
    pytest.importorskip("kornia")
    pairs, rows = opened(folder, minilm, image_settings)
    table = load_table([str(folder / "train.jsonl")], key="data_path")
    whole = PairDataset(
        table,
        reader=reader_of(folder, table.column_names),
        processor=pairs.processor,
        seed=1,
        max_negatives=2,
    )
    order = Order([NUM_RECORDS], global_batch_size=4, seed=1)
    keys = [
        [SampleKey(int(i), order.batch(step)[0]) for i in order.batch(step)[1]] for step in range(7)
    ]
    expected = list(BatchLoader(whole, keys, num_workers=0, prefetch_factor=2))
    assert content(loaded(pairs, rows)) == content(expected)
    assert expected[0].negative_counts is not None


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": " "}, "record 7, column 'caption': ' ' is a blank text"),
        ({"caption": 3}, "record 7, column 'caption': 3 is int, not text"),
        ({"image": "../7.png"}, "record 7, column 'image': .*lies outside image_root"),
        ({"image": "https://a.b/c.png"}, "record 7, column 'image': .*URL"),
        ({"image": "none.png"}, "record 7, positive: image .*none.png"),
    ],
)
@pytest.mark.one_in(3)
def test_a_bad_record_is_named_by_file_and_number(
    folder: Path,
    minilm: str,
    image_settings: dict[str, Any],
    num_workers: int,
    changes: dict[str, Any],
    message: str,
) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[7] = json.dumps(json.loads(lines[7]) | changes)
    (folder / "train.jsonl").write_text("\n".join(lines))
    pairs, rows = opened(folder, minilm, image_settings)
    found = loaded(pairs, rows, num_workers=num_workers, num_steps=3)
    (error,) = [batch.error for batch in found if batch.error is not None]
    assert isinstance(error, DataError)
    with pytest.raises(DataError, match=f"^{folder}/train.jsonl, {message}"):
        raise error
    assert sorted(len(batch.indices) for batch in found) == [0, 4, 4]


def test_records_of_several_files_are_augmented_on_their_own() -> None:
    rows = stream(3, 3)
    assert len({row.index for row in rows.epoch(0)}) == 6


def test_the_head_is_not_shuffled() -> None:
    rows = stream(3, 3)
    assert texts(rows.head(4)) == ["0:0", "0:1", "0:2", "1:0"]
    assert len(rows.head(50)) == 6


def test_a_sample_has_the_number_of_its_row(
    folder: Path, minilm: str, image_settings: dict[str, Any]
) -> None:
    pytest.importorskip("kornia")
    pairs, rows = opened(folder, minilm, image_settings)
    sample = pairs[rows.head(3)[2]]
    assert isinstance(sample, Sample)
    assert sample.index == 2
