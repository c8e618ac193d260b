"""Dataset, collator and loader together, as training uses them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, SequentialSampler

from vembed_ds.data import loader as loading
from vembed_ds.data.augment import ImageAugmentation
from vembed_ds.data.collators import Batch, collate, join
from vembed_ds.data.dataset import PairDataset, Sample, item_seed
from vembed_ds.data.loader import BatchLoader
from vembed_ds.data.order import Order
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import EncodedItem
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import Item, Record, RecordReader
from vembed_ds.data.sampler import GlobalBatchSampler, SampleKey
from vembed_ds.errors import ConfigError, DataError

Noise = Callable[..., Image.Image]
NUM_RECORDS = 12


@pytest.fixture
def folder(tmp_path: Path, noise: Noise) -> Path:
    rows = []
    for index in range(NUM_RECORDS):
        noise(index).save(tmp_path / f"{index}.png")
        rows.append(
            {"caption": f"picture {'of ' * index}{index}", "image": f"{index}.png", "id": index}
        )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def pairs(
    folder: Path,
    minilm: str,
    image_settings: dict[str, Any],
    *,
    seed: int = 1,
    augment: bool = True,
) -> PairDataset:
    table = load_table([str(folder / "train.jsonl")], key="data_path")
    reader = RecordReader(
        table.column_names,
        retrieval_mode="t2i",
        column_mapping={},
        image_root=str(folder),
        origin="train.jsonl",
    )
    chain = ImageAugmentation([{"RandomAffine": {"degrees": 20, "p": 1.0}}]) if augment else None
    processor = build_item_processor(minilm, image_settings, max_length=12, augmentation=chain)
    return PairDataset(table, reader=reader, processor=processor, seed=seed)


@pytest.fixture
def dataset(folder: Path, minilm: str, image_settings: dict[str, Any]) -> PairDataset:
    pytest.importorskip("kornia")
    return pairs(folder, minilm, image_settings)


def loader(dataset: PairDataset, *, num_workers: int = 0, **options: int) -> BatchLoader:
    settings = {"rank": 0, "world_size": 1, "num_steps": 5} | options
    order = Order([len(dataset)], global_batch_size=4, seed=5)
    sampler = GlobalBatchSampler(order, **settings)
    return BatchLoader(dataset, sampler, num_workers=num_workers, prefetch_factor=2)


def good(sample: object) -> Sample:
    assert isinstance(sample, Sample)
    return sample


def pixels(sample: object) -> list[float]:
    return good(sample).roles["positive"][0].inputs["pixel_values"].ravel().tolist()  # type: ignore[no-any-return]


def content(batches: list[Batch]) -> list[Any]:
    return [
        (batch.indices, role, item.stream, name, array.tolist())
        for batch in batches
        for role, items in batch.roles.items()
        for item in items
        for name, array in item.inputs.items()
    ]


def test_sample_holds_both_roles(dataset: PairDataset, folder: Path) -> None:
    assert len(dataset) == NUM_RECORDS
    assert dataset.table.column_names == ["caption", "image"]
    assert dataset.record(3) == Record(
        3, Item(text="picture of of of 3"), Item(image=f"{folder}/3.png")
    )
    sample = good(dataset[3])
    assert sample.index == 3
    assert [(role, [item.stream for item in items]) for role, items in sample.roles.items()] == [
        ("query", ["text"]),
        ("positive", ["image"]),
    ]


def test_only_sample_keys_augment(
    dataset: PairDataset, folder: Path, minilm: str, image_settings: dict[str, Any]
) -> None:
    plain = pairs(folder, minilm, image_settings, augment=False)
    assert pixels(dataset[3]) == pixels(plain[3]) == pixels(plain[SampleKey(3, 0)])
    first = pixels(dataset[SampleKey(3, 0)])
    assert first == pixels(dataset[SampleKey(3, 0)])
    assert first != pixels(dataset[3])
    assert first != pixels(dataset[SampleKey(3, 1)])
    assert first != pixels(pairs(folder, minilm, image_settings, seed=2)[SampleKey(3, 0)])


def test_item_seeds_are_distinct_and_fixed() -> None:
    seeds = {
        item_seed(seed, epoch=epoch, index=index, role=role)
        for seed in range(3)
        for epoch in range(3)
        for index in range(50)
        for role in ("query", "positive")
    }
    assert len(seeds) == 3 * 3 * 50 * 2
    # Written down once: a change would alter every run that is resumed.
    assert item_seed(42, epoch=1, index=7, role="query") == 16773485418750826532


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_do_not_depend_on_the_workers(dataset: PairDataset, num_workers: int) -> None:
    expected = content(list(loader(dataset)))
    assert len(expected) == 5 * 4 * 4  # steps, pairs, arrays (three of the text, one image)
    assert content(list(loader(dataset, num_workers=num_workers))) == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_results_do_not_depend_on_the_ranks(dataset: PairDataset, world_size: int) -> None:
    shares = [list(loader(dataset, rank=rank, world_size=world_size)) for rank in range(world_size)]
    whole = list(loader(dataset))
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert sum((part.indices for part in parts), []) == batch.indices  # noqa: RUF017 - short
        for role, items in batch.roles.items():
            joined = [item for part in parts for item in part.roles[role]]
            for one, other in zip(joined, items, strict=True):
                assert all(
                    np.array_equal(one.inputs[name], other.inputs[name]) for name in other.inputs
                )


def test_resumed_loader_continues(dataset: PairDataset) -> None:
    rest = content(list(loader(dataset, start_step=3)))
    assert rest == content(list(loader(dataset))[3:])


@pytest.mark.parametrize("part_size", [1, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.one_in(5)
def test_parts_make_whole_batches(
    dataset: PairDataset, monkeypatch: pytest.MonkeyPatch, part_size: int, num_workers: int
) -> None:
    expected = content(list(loader(dataset)))
    monkeypatch.setattr(loading, "PART_SIZE", part_size)
    assert content(list(loader(dataset, num_workers=num_workers))) == expected


def test_workers_share_the_batches_they_prepare_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PART_SIZE", 4)
    first = list(range(10))  # three parts
    assert loading._parts_ahead(first, 2, 3) == 6  # two batches
    assert loading._parts_ahead(first, 1, 8) == 8  # no worker idles


def test_the_first_error_of_a_part_replaces_the_batch() -> None:
    good_part = Batch([1], {"query": [EncodedItem("text", {})]})
    bad = Batch([], error=DataError("first"))
    assert join([good_part, bad, Batch([], error=DataError("second"))]) == bad


def test_a_second_iteration_repeats_the_same_batches(dataset: PairDataset) -> None:
    batches = loader(dataset, num_workers=1)
    assert content(list(batches)) == content(list(batches))


def test_iterating_leaves_the_random_state_alone(dataset: PairDataset) -> None:
    before = torch.get_rng_state()
    list(loader(dataset))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_reads_plain_row_numbers(dataset: PairDataset) -> None:
    batches = BatchLoader(
        dataset,
        BatchSampler(SequentialSampler(range(5)), batch_size=2, drop_last=False),
        num_workers=0,
        prefetch_factor=2,
    )
    assert [batch.indices for batch in batches] == [[0, 1], [2, 3], [4]]
    assert content([collate([dataset[0], dataset[1]])]) == content([next(iter(batches))])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_arrives_as_one_error(
    dataset: PairDataset, folder: Path, num_workers: int
) -> None:
    (folder / "7.png").write_bytes(b"")
    batches = list(loader(dataset, num_workers=num_workers, num_steps=3))
    errors = [batch.error for batch in batches if batch.error is not None]
    assert len(errors) == 1
    assert isinstance(errors[0], DataError)
    assert str(errors[0]).startswith(
        f"train.jsonl, record 7, positive: image {folder}/7.png is an empty file"
    )
    assert sorted(len(batch.indices) for batch in batches) == [0, 4, 4]


def test_collate_keeps_order_and_passes_the_first_error_on() -> None:
    def sample(index: int) -> Sample:
        return Sample(
            index,
            {"query": [EncodedItem("text", {"input_ids": np.array([index])})]},
            keys={"query": [7 * index]},
        )

    batch = collate([sample(4), sample(2)])
    assert batch.indices == [4, 2]
    assert [item.inputs["input_ids"].item() for item in batch.roles["query"]] == [4, 2]
    assert batch.keys == {"query": [28, 14]}
    assert batch.negative_counts is batch.labels is batch.scores is None
    assert batch.teacher_scores is batch.negative_scores is None
    assert batch.teacher_roles == {}
    errors = [DataError("first"), ConfigError(["second"])]
    assert collate([sample(1), *errors]) == Batch([], error=errors[0])
    assert collate([]) == Batch([])


def test_errors_of_others_are_not_swallowed(
    dataset: PairDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("a defect of ours")

    monkeypatch.setattr(dataset.processor, "encode", fail)
    with pytest.raises(ZeroDivisionError):
        dataset[0]


def test_text_that_is_not_utf8_names_the_record(tmp_path: Path, minilm: str) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"query": bad, "positive": ["b"]}), tmp_path / "a.parquet")
    table = load_table([str(tmp_path / "a.parquet")], key="data_path")
    reader = RecordReader(
        table.column_names,
        retrieval_mode="t2t",
        column_mapping={},
        image_root="",
        origin="a.parquet",
    )
    dataset = PairDataset(
        table, reader=reader, processor=build_item_processor(minilm, None, max_length=8), seed=0
    )
    with pytest.raises(
        DataError, match=r"a.parquet, record 0: .*can't decode.*; save the file as UTF-8"
    ):
        dataset.record(0)


def test_dataset_survives_pickling(dataset: PairDataset) -> None:
    twin = pickle.loads(pickle.dumps(dataset))
    assert pixels(twin[SampleKey(2, 1)]) == pixels(dataset[SampleKey(2, 1)])


def test_negatives_labels_and_all_scores_travel_with_the_batch(
    tmp_path: Path, minilm: str, write_jsonl: Any
) -> None:
    rows = [
        {
            "query": f"q {index}",
            "positive": f"p {index}",
            "negatives": [f"n {index} {place}" for place in range(index)],
            "label": index % 2,
            "score": index / 4,
            "pos_scores": [index + 0.5],
            "neg_scores": [10 * index + place for place in range(index)],
        }
        for index in range(4)
    ]
    table = load_table([write_jsonl(rows)], key="data_path")
    reader = RecordReader(
        table.column_names,
        retrieval_mode="t2t",
        column_mapping={},
        image_root="",
        origin="rows",
        teacher_scores=True,
    )
    processor = build_item_processor(minilm, None, max_length=12)

    def batch(max_negatives: int | None, epoch: int = 0) -> Batch:
        data = PairDataset(
            table, reader=reader, processor=processor, seed=3, max_negatives=max_negatives
        )
        return collate([data[SampleKey(index, epoch)] for index in (3, 0, 2)])

    def texts(found: Batch) -> list[str]:
        return [processor.tokenizer.decode(i.inputs["input_ids"]) for i in found.roles["negative"]]

    whole = batch(None)
    assert whole.negative_counts == [3, 0, 2]
    assert whole.labels == [1, 0, 0]
    assert whole.scores == [0.75, 0.0, 0.5]
    assert len(set(whole.keys["negative"])) == len(whole.keys["negative"]) == 5
    assert [text[6:11] for text in texts(whole)] == ["n 3 0", "n 3 1", "n 3 2", "n 2 0", "n 2 1"]
    assert whole.teacher_scores == [3.5, 0.5, 2.5]
    assert whole.negative_scores == [30.0, 31.0, 32.0, 20.0, 21.0]
    drawn = {tuple(texts(batch(1, epoch))) for epoch in range(20)}
    assert batch(1).negative_counts == [1, 0, 1]
    assert len(drawn) == 6  # every choice of one of three and one of two
    assert texts(batch(1, 5)) == texts(batch(1, 5))
    for epoch in range(6):  # the scores follow the negatives that are drawn
        some = batch(1, epoch)
        assert some.negative_scores is not None
        expected = [f"n {int(score) // 10} {int(score) % 10}" for score in some.negative_scores]
        assert [text[6:11] for text in texts(some)] == expected
