"""Several data sets as one, and records that are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vembed_ds.data.collators import collate
from vembed_ds.data.dataset import PairDataset, Sample
from vembed_ds.data.mixture import Mixture
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.data.sampler import SampleKey
from vembed_ds.data.skipping import check_number, find_bad_records
from vembed_ds.errors import DataError

Make = Callable[..., PairDataset]


@pytest.fixture
def make(minilm: str, image_settings: dict[str, Any], write_jsonl: Callable[..., str]) -> Make:
    processor = build_item_processor(minilm, image_settings, max_length=12)

    def build(rows: Sequence[dict[str, Any]], name: str, mode: str = "t2t") -> PairDataset:
        table = load_table([write_jsonl(rows, name)], key="data_path")
        reader = RecordReader(
            table.column_names,
            retrieval_mode=mode,
            column_mapping={},
            image_root="",
            origin=name,
            teacher_scores="pos_scores" in table.column_names,
        )
        return PairDataset(table, reader=reader, processor=processor, seed=0)

    return build


def rows(number: int, name: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"query": f"{name} query {index}", "positive": f"{name} positive {index}", **more}
        for index in range(number)
    ]


def sample(found: object) -> Sample:
    assert isinstance(found, Sample), found
    return found


def test_records_are_numbered_through(make: Make) -> None:
    mixture = Mixture([make(rows(3, "a"), "a.jsonl"), make(rows(2, "b"), "b.jsonl")])
    assert len(mixture) == 5
    assert [mixture.place(index) for index in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert mixture.record(4).query.text == "b query 1"
    assert mixture.locate(4) == ("b.jsonl", 1)
    found = sample(mixture[SampleKey(4, 2)])
    assert (found.index, found.member) == (4, 1)


def test_mixed_data_sets_give_the_same_things(make: Make) -> None:
    plain = make(rows(2, "a"), "a.jsonl")
    rich = make(rows(2, "b", negatives=["n"], label=3), "b.jsonl")
    other = make(rows(2, "c", label=3), "c.jsonl")
    mixture = Mixture([plain, rich, other], mixed=True)
    batch = collate([sample(mixture[index]) for index in range(6)])
    assert batch.negative_counts == [0, 0, 1, 1, 0, 0]
    assert batch.labels is not None
    a0, a1, b0, b1, c0, c1 = batch.labels
    assert b0 == b1
    assert c0 == c1
    assert len({a0, a1, b0, c0}) == 4  # no class is shared between data sets


def test_scores_of_a_mixture_are_those_of_its_negatives(make: Make) -> None:
    plain = make(rows(1, "a", pos_scores=[0.5]), "a.jsonl")
    rich = make(rows(1, "b", pos_scores=[2], negatives=["n"], neg_scores=[1.5]), "b.jsonl")
    for order in ([plain, rich], [rich, plain], [plain, plain]):
        mixture = Mixture(order, mixed=True)
        batch = collate([sample(mixture[index]) for index in range(2)])
        assert batch.teacher_scores == [0.5 if member is plain else 2.0 for member in order]
        assert batch.negative_scores == ([1.5] if rich in order else None)
    # None on one rank is None on all: a rank that drew no negatives has an empty list.
    assert collate([sample(Mixture([rich, plain], mixed=True)[1])]).negative_scores == []


def test_homogeneous_data_sets_stay_as_they_are(make: Make) -> None:
    mixture = Mixture(
        [make(rows(1, "a"), "a.jsonl"), make(rows(1, "b", negatives=["n"], label=3), "b.jsonl")]
    )
    assert sample(mixture[0]).roles.keys() == {"query", "positive"}
    assert sample(mixture[1]).label == 3


def test_scores_of_only_some_are_refused(make: Make) -> None:
    members = [make(rows(1, "a", score=0.5), "a.jsonl"), make(rows(1, "b"), "b.jsonl")]
    with pytest.raises(DataError, match=r"b\.jsonl: has no scores, but another data set has"):
        Mixture(members, mixed=True)
    assert len(Mixture(members)) == 2


def test_content_keys_find_equal_contents(make: Make) -> None:
    first = [{"query": "x", "positive": "p", "negatives": ["q"]}]
    second = [{"query": "y", "positive": "q", "negatives": ["z", "z"]}]
    mixture = Mixture([make(first, "a.jsonl"), make(second, "b.jsonl")])
    one, two = map(set, mixture.content_keys())
    assert len(one) == len(two) == 3
    assert len(one & two) == 1


def test_bad_records_are_found_and_left_out(make: Make, tmp_path: Path) -> None:
    data = []
    for index in range(6):
        Image.new("RGB", (20, 20), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")
        data.append({"query": f"picture {index}", "image": str(tmp_path / f"{index}.png")})
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    data[4]["query"] = " "
    dataset = make(data, "pictures.jsonl", "t2i")
    bad = find_bad_records(dataset, num_threads=2)
    assert [record.row for record in bad] == [2, 4]
    assert "2.png cannot be read" in bad[0].message
    assert "record 4, column 'query': ' ' is a blank text" in bad[1].message
    good = dataset.without({record.row for record in bad})
    assert len(good) == 4
    assert [good.record(index).index for index in range(4)] == [0, 1, 3, 5]
    places = map(Mixture([good, dataset]).locate, range(6))
    assert [number for _, number in places] == [0, 1, 3, 5, 0, 1]
    assert not find_bad_records(good, num_threads=1)
    check_number(bad, limit=2, origin="pictures.jsonl", total=6)
    message = r"pictures.jsonl: 2 of 6 records cannot be used, and max_bad_records=1; the first: "
    with pytest.raises(DataError, match=message):
        check_number(bad, limit=1, origin="pictures.jsonl", total=6)
    with pytest.raises(DataError, match="2 of 2 records cannot be used"):
        check_number(bad, limit=9, origin="pictures.jsonl", total=2)
