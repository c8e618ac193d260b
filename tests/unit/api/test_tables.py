"""Tables of a script as files, by content, that the readers read as they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from vembed_ds.api.tables import is_paths, store_records
from vembed_ds.data.images import open_image
from vembed_ds.data.readers import load_table
from vembed_ds.errors import ConfigError, DataError

PICTURE = Image.new("RGB", (3, 2), (200, 10, 30))


def stored(data: Any, folder: Path) -> datasets.Dataset:
    name = store_records(data, folder, name="train_data")
    assert [path.name for path in folder.iterdir()] == [name], "nothing else is left there"
    return load_table([str(folder / name)], key="data_path")


def test_what_paths_are() -> None:
    for paths in ("a.jsonl", Path("a"), ["a", Path("b")], ("a",)):
        assert is_paths(paths), paths
    assert not is_paths([])
    assert not is_paths([{"query": "a"}])


def test_a_key_of_any_row_is_a_column(tmp_path: Path) -> None:
    rows = [
        {"query": "a", "positive": "b"},
        {"query": "c", "positive": Path("d/e"), "negatives": ["f", "g"], "label": 3},
    ]
    assert list(stored(rows, tmp_path)) == [
        {"query": "a", "positive": "b", "negatives": None, "label": None},
        {"query": "c", "positive": "d/e", "negatives": ["f", "g"], "label": 3},
    ]


def test_pictures_are_kept_pixel_by_pixel(tmp_path: Path) -> None:
    table = stored([{"query": "a", "positive": PICTURE, "negatives": [PICTURE]}], tmp_path)
    row = table[0]
    for cell in (row["positive"], row["negatives"][0]):
        assert open_image(cell, origin="here").tobytes() == PICTURE.tobytes()


def test_files_of_an_image_column_stay_where_they_are(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    table = datasets.Dataset.from_dict({"query": ["a"], "positive": [str(tmp_path / "a.png")]})
    table = table.cast_column("positive", datasets.Image())
    cell = stored(table, tmp_path / "data")[0]["positive"]
    assert cell == {"bytes": None, "path": str(tmp_path / "a.png")}


def test_the_name_is_that_of_the_content(tmp_path: Path) -> None:
    rows = [{"query": str(i), "positive": PICTURE} for i in range(3)]
    first = store_records(rows, tmp_path, name="train_data")
    assert store_records(list(rows), tmp_path, name="train_data") == first
    assert store_records(rows[:2], tmp_path, name="train_data") != first
    table = datasets.Dataset.from_list(rows)
    assert store_records(table.select([0, 1]), tmp_path, name="train_data") == store_records(
        rows[:2], tmp_path, name="train_data"
    )
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ([], DataError, "train_data: holds no records"),
        (datasets.Dataset.from_dict({"query": []}), DataError, "train_data: holds no records"),
        (
            {"query": ["a"]},
            ConfigError,
            "train_data: is a dict; expected a path, a list of paths, a",
        ),
        ([{"query": "a"}, "b"], ConfigError, r"train_data\[1\]: is a str; expected a path"),
        (3, ConfigError, "train_data: is a int; expected"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"query": ["a"]})}),
            ConfigError,
            r"train_data: holds the splits train; give one, such as data\['train'\]",
        ),
        (datasets.DatasetDict(), ConfigError, r"train_data: holds the splits \(none\); give one"),
        (
            datasets.Dataset.from_dict({"query": ["a"]}).with_transform(lambda rows: rows),
            ConfigError,
            r"train_data: has a transform \(with_transform\), and what is written are the rows",
        ),
        ([{"query": "a", 1: "b"}], ConfigError, r"train_data\[0\]: the key 1 is no text"),
        (
            datasets.Dataset.from_dict({"query": ["a"]}).to_iterable_dataset(),
            ConfigError,
            "train_data: an IterableDataset has no rows to go back to .* streaming=True",
        ),
        (
            [{"query": "a"}, {"query": [1]}],
            DataError,
            "train_data: the records do not make a table .* values of one type",
        ),
    ],
)
def test_what_is_no_table_is_refused(
    tmp_path: Path, data: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        store_records(data, tmp_path, name="train_data")
    assert list(tmp_path.iterdir()) == []


def test_a_data_frame_is_told_how(tmp_path: Path) -> None:
    import pandas as pd  # type: ignore[import-untyped]

    with pytest.raises(ConfigError, match=r"data\.to_dict\('records'\)"):
        store_records(pd.DataFrame({"query": ["a"]}), tmp_path, name="train_data")  # type: ignore[arg-type]
