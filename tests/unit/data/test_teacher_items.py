"""The items of a record as teachers read them, from tables, mixtures and streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vembed_ds.data.augment import ImageAugmentation
from vembed_ds.data.collators import Batch
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.loader import BatchLoader
from vembed_ds.data.mixture import Mixture
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.data.sampler import SampleKey, StreamedRow
from vembed_ds.data.streaming import PairStream
from vembed_ds.data.teacher_items import Instructions, TeacherItems

Noise = Callable[..., Image.Image]
KEYS = [[SampleKey(index, 3) for index in (2, 0, 1)]]
FIND = Instructions(query="find: ", document="see: ")


@pytest.fixture
def rows(tmp_path: Path, noise: Noise) -> list[dict[str, Any]]:
    for index in range(3):
        noise(index).save(tmp_path / f"{index}.png")
    return [
        {"query": f"q {index}", "positive": f"p {index}", "image": f"{index}.png"}
        | {"negatives": [f"n {place}" for place in range(3)], "negative_images": ["0.png"] * 3}
        for index in range(3)
    ]


@pytest.fixture
def students(minilm: str, image_settings: dict[str, Any]) -> ItemProcessor:
    pytest.importorskip("kornia")
    chain = ImageAugmentation([{"RandomAffine": {"degrees": 20, "p": 1.0}}])
    return build_item_processor(minilm, image_settings, max_length=12, augmentation=chain)


@pytest.fixture
def teachers(minilm: str, image_settings: dict[str, Any]) -> ItemProcessor:
    return build_item_processor(minilm, image_settings | {"do_normalize": False}, max_length=9)


@pytest.fixture
def dataset(
    rows: list[dict[str, Any]],
    students: ItemProcessor,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> PairDataset:
    table = load_table([write_jsonl(rows)], key="data_path")
    reader = reader_of(table.column_names, tmp_path)
    return PairDataset(table, reader=reader, processor=students, seed=1, max_negatives=2)


def reader_of(columns: list[str], root: Path) -> RecordReader:
    return RecordReader(
        columns,
        retrieval_mode="t2m",
        column_mapping={},
        image_root=str(root),
        origin="rows",
        instructions={"query": "student's ", "positive": "student's "},
    )


def loaded(data: Any, batches: Any = KEYS, *, num_workers: int = 0) -> Batch:
    (batch,) = BatchLoader(data, batches, num_workers=num_workers, prefetch_factor=1)
    assert batch.error is None
    return batch


def content(roles: dict[str, list[EncodedItem]]) -> list[Any]:
    return [
        (role, item.stream, name, array.tolist())
        for role, items in roles.items()
        for item in items
        for name, array in item.inputs.items()
    ]


def texts(processor: ItemProcessor, items: list[EncodedItem]) -> list[str]:
    return [
        processor.tokenizer.decode(item.inputs["input_ids"], skip_special_tokens=True)
        for item in items
    ]


def test_a_teacher_reads_the_same_items_in_its_own_way(
    dataset: PairDataset, students: ItemProcessor, teachers: ItemProcessor
) -> None:
    before = loaded(dataset)
    dataset.teachers = {"big": TeacherItems(teachers, FIND)}
    batch = loaded(dataset)
    assert content(batch.roles) == content(before.roles)
    assert batch.keys == before.keys
    found = batch.teacher_roles["big"]
    assert found.keys() == batch.roles.keys()
    assert texts(teachers, found["query"]) == ["find : q 2", "find : q 0", "find : q 1"]
    drawn = texts(students, batch.roles["negative"])
    assert len(drawn) == 6
    assert texts(teachers, found["negative"]) == [
        text.replace("student ' s", "see :") for text in drawn
    ]
    # Without augmentation: neither the student's nor, with its own seed, another.
    record = dataset.record(2).positive
    plain = teachers.encode(record, origin="", augment_seed=None).inputs["pixel_values"]
    assert np.array_equal(found["positive"][0].inputs["pixel_values"], plain)


def test_teachers_that_are_set_before_the_loader_starts_reach_its_processes(
    dataset: PairDataset, teachers: ItemProcessor
) -> None:
    mixture = Mixture([dataset])
    loader = BatchLoader(mixture, KEYS, num_workers=1, prefetch_factor=1)
    dataset.teachers = {"big": TeacherItems(teachers, FIND)}
    (there,) = loader
    here = loaded(mixture)
    assert there.error is None
    assert content(there.teacher_roles["big"]) == content(here.teacher_roles["big"])


def test_what_is_shared_is_encoded_once_unless_it_is_augmented(
    dataset: PairDataset, students: ItemProcessor
) -> None:
    own = Instructions("student's ", "student's ")
    dataset.teachers = {"twin": TeacherItems(students, own, shared=True)}
    augmented = loaded(dataset)
    plain = loaded(dataset, [[2, 0, 1]])
    for role, items in plain.roles.items():
        twins = plain.teacher_roles["twin"][role]
        assert all(one is other for one, other in zip(items, twins, strict=True))
    first = augmented.teacher_roles["twin"]["positive"][0].inputs["pixel_values"]
    assert np.array_equal(first, plain.roles["positive"][0].inputs["pixel_values"])
    assert not np.array_equal(first, augmented.roles["positive"][0].inputs["pixel_values"])


def test_a_stream_gives_what_the_table_gives(
    dataset: PairDataset,
    rows: list[dict[str, Any]],
    students: ItemProcessor,
    teachers: ItemProcessor,
    tmp_path: Path,
) -> None:
    stream = PairStream(
        ["rows"],
        reader=reader_of(list(rows[0]), tmp_path),
        processor=students,
        seed=1,
        max_negatives=2,
    )
    dataset.teachers = stream.teachers = {"big": TeacherItems(teachers, FIND)}
    keys = [[StreamedRow(0, index, 3, rows[index]) for index in (2, 0, 1)]]
    streamed, expected = loaded(stream, keys), loaded(dataset)
    assert content(streamed.teacher_roles["big"]) == content(expected.teacher_roles["big"])


def test_a_mixture_gives_every_record_negatives_for_the_teacher_too(
    dataset: PairDataset,
    rows: list[dict[str, Any]],
    students: ItemProcessor,
    teachers: ItemProcessor,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> None:
    bare = [{name: row[name] for name in ("query", "positive", "image")} for row in rows]
    table = load_table([write_jsonl(bare, "bare.jsonl")], key="data_path")
    reader = reader_of(table.column_names, tmp_path)
    other = PairDataset(table, reader=reader, processor=students, seed=1)
    for member in (dataset, other):
        member.teachers = {"big": TeacherItems(teachers, FIND)}
    batch = loaded(Mixture([dataset, other], mixed=True), [[5, 0]])
    assert batch.negative_counts == [0, 2]
    assert [len(items) for items in batch.teacher_roles["big"].values()] == [2, 2, 2]
