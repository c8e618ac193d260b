"""Reading files, folders and hub data sets row by row."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.archives import write_tar
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.data.shards import first_columns, identity_of, numbered_rows, open_shards
from vembed_ds.errors import DataError

ROWS = [{"query": "a/b", "positive": "NA"}, {"query": "ü, c", "positive": "007"}]
TEXTS = {
    "a.jsonl": '{"query": "a/b", "positive": "NA"}\n\n{"query": "ü, c", "positive": "007"}\n',
    "bom.json": '\ufeff{"query":"a/b","positive":"NA"}\r\n{"query":"ü, c","positive":"007"}',
    "a.csv": 'query,positive\na/b,NA\n"ü, c",007\n',
    "bom.csv": '\ufeffquery,positive\r\na/b,NA\r\n  \r\n"ü, c","007"\r\n',
    "a.TSV": "query\tpositive\na/b\tNA\nü, c\t007\n",
}
WriteJsonl = Callable[..., str]


def rows_of(*paths: str | Path) -> list[dict[str, Any]]:
    shards = open_shards([str(path) for path in paths], key="data_path")
    columns = first_columns(shards)
    return [
        row for shard in shards for _, row in numbered_rows(shard, columns=columns, needed=columns)
    ]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def png(colour: str = "red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (3, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("compressed", [False, True])
def test_texts_give_the_rows_of_the_table(tmp_path: Path, name: str, compressed: bool) -> None:
    content = TEXTS[name].encode()
    file = (
        write(tmp_path, f"{name}.gz", gzip.compress(content))
        if compressed
        else write(tmp_path, name, content)
    )
    assert rows_of(file) == load_table([str(file)], key="data_path").to_list() == ROWS


def test_parquet_gives_the_rows_of_the_table(tmp_path: Path) -> None:
    features = datasets.Features({"query": datasets.Value("string"), "image": datasets.Image()})
    rows = [{"query": "a", "image": {"bytes": png(), "path": "a.png"}}] * 3
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")
    assert found == load_table([str(tmp_path / "a.parquet")], key="data_path").to_list() == rows


def test_only_the_needed_columns_of_parquet_are_read(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"query": ["a"], "other": [1], "positive": ["b"]}), tmp_path / "a.parquet"
    )
    (shard,) = open_shards([str(tmp_path / "a.parquet")], key="data_path")
    assert list(shard.rows(["positive", "query"])) == [{"query": "a", "positive": "b"}]


def test_webdataset_gives_the_rows_of_the_table(tmp_path: Path) -> None:
    for number in range(2):
        members = {
            f"deep/k{number}{place}.{kind}": content
            for place in range(2)
            for kind, content in (
                ("PNG", png()),
                ("seg.txt", f"text {place}".encode()),
                ("cls", b"3"),
                ("json", b'{"caption": "c", "tags": ["x"]}'),
            )
        }
        write_tar(tmp_path, f"s-{number}.tar", members)
    for path in (tmp_path / "s-{0..1}.tar", tmp_path / "s-*.tar", tmp_path):
        table = load_table([str(path)], key="data_path")
        kept = ["__key__", "PNG", "seg.txt", "cls", "json.caption", "json.tags"]
        expected = table.select_columns(kept).to_list()
        # The library puts images into a dict of bytes and name; both are images to the reader.
        for row in expected:
            row["PNG"] = row["PNG"]["bytes"]
        found = rows_of(path)
        assert [{name: row[name] for name in kept} for row in found] == expected
        assert found[0].keys() == set(kept)
    reader = RecordReader(
        list(found[0]),
        retrieval_mode="t2i",
        column_mapping={"query": "json.caption", "positive_image": "PNG", "label": "cls"},
        image_root="",
        origin="s.tar",
    )
    assert reader.read(found[3], 3).positive.image == png()
    assert reader.read(found[3], 3).label == 3


def test_folders_and_lists(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "files").mkdir(exist_ok=True)
        write(tmp_path / "files", name, TEXTS["a.csv"])
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(
        tmp_path / "saved"
    )
    assert rows_of(tmp_path / "files") == ROWS * 2
    assert rows_of(tmp_path / "saved") == ROWS
    assert rows_of(tmp_path / "saved", tmp_path / "files") == ROWS * 3


def test_a_folder_of_images_comes_from_the_library(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, f"{name}.png", png())
    found = rows_of(tmp_path)
    assert [row["label"] for row in found] == [0, 1]
    assert Path(found[1]["image"]["path"]).name == "dog.png"  # not decoded
    identity = identity_of(open_shards([str(tmp_path)], key="data_path"))
    write(tmp_path / "cat", "cat.png", png() + b"longer")
    assert identity_of(open_shards([str(tmp_path)], key="data_path")) != identity


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path, f"{number}.jsonl", TEXTS["a.jsonl"]) for number in range(2)]
    builder = datasets.load_dataset_builder("json", data_files=[str(file) for file in files])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: {"org/pairs": builder}[name])
    shards = open_shards(["org/pairs"], key="data_path")
    assert [shard.name for shard in shards] == [str(file) for file in files]
    assert rows_of("org/pairs") == ROWS * 2


def test_an_unreachable_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(
        DataError,
        match=r"data_path=org/pairs: neither a file, a folder nor .*Couldn't reach the Hub",
    ):
        open_shards(["org/pairs"], key="data_path")


def test_nothing_is_converted(tmp_path: Path) -> None:
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    rows_of(write(tmp_path, "a.jsonl", TEXTS["a.jsonl"]), write(tmp_path, "a.csv", TEXTS["a.csv"]))
    assert not list(cache.rglob("*.arrow"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", r"data_path=.*none.jsonl: file does not exist; correct data_path"),
        ("s-{0..1}.tar", r"data_path=.*: .*s-0.tar: file does not exist"),
        ("folder", "no split train; it has test"),
        ("empty", "folder cannot be read as data"),
        ("empty.csv", r"empty.csv: holds no records \(the file is empty\)"),
    ],
)
def test_what_is_missing_is_named_at_once(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", "test.csv", TEXTS["a.csv"])
    write(tmp_path, "empty.csv", "")
    with pytest.raises(DataError, match=message):
        open_shards([str(tmp_path / name)], key="data_path")


def test_no_paths() -> None:
    with pytest.raises(DataError, match="data_path names no data"):
        open_shards([], key="data_path")


GOOD = b'{"query": "a", "positive": "b"}\n'
NESTED = b'{"query": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b"\n" + GOOD[:20] + b"\n", "line 3 is not valid JSON"),
        ("a.jsonl", GOOD + b'["a"]\n', "line 2 is list, not a JSON object"),
        ("a.jsonl", GOOD + b'{"query": "a", "query": "b"}\n', "line 2 .*a name occurs twice"),
        ("a.jsonl", GOOD + b'{"query": "\\ud800"}\n', "line 2 holds half of a surrogate pair"),
        ("a.jsonl", GOOD + b'{"query": "\xff"}\n', "line 2 is not UTF-8"),
        ("a.jsonl", GOOD + b"\0\n", "line 2 holds a NUL byte"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1 is UTF-16"),
        # Arrow's parser would end the process without a word.
        ("a.jsonl", GOOD + NESTED, "line 2 is nested more than 64 levels deep"),
        ("a.json", b"[" + GOOD + b"]", "is one JSON array, which no parser streams"),
        ("a.jsonl", b"\n", "holds no records"),
        (
            "a.jsonl",
            GOOD + b'{"query": "a", "tag": 1}\n',
            "record 1: the column 'tag' is not among",
        ),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-9], "Compressed file ended"),
        ("a.jsonl.gz", gzip.compress(GOOD * 100_000), "grows to more than 200 times its size"),
        ("a.csv", b"query,positive\na,b\nc,d,e\n", "line 3 has 3 cells, and the header 2"),
        ("a.csv", b'query,positive\na,b\n"c,d\n', "line 3: unexpected end of data"),
        ("a.csv", b'query,positive\n"so" he,b\n', "line 2: ',' expected after '\"'"),
        ("a.csv", b"query,query\na,b\n", "a column name occurs twice"),
        ("a.csv", b"\n\n", "no header line"),
        ("a.csv", b"query,positive\n", "holds no records"),
        ("a.tsv", b'q\tp\n"c\td\ne"\tf\n', "line 2: a text that starts with a quote mark goes on"),
        ("a.parquet", b"hello", "Parquet"),
        ("a.tar", b"hello" * 1000, "truncated header|invalid header"),
    ],
)
def test_damage_is_named_when_it_is_reached(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = write(tmp_path, name, content)
    (shard,) = open_shards([str(file)], key="data_path")
    columns = None if name.endswith((".csv", ".tsv", ".parquet", ".tar")) else ["query", "positive"]
    with pytest.raises(DataError, match=rf"^{file}.*({message})"):
        list(numbered_rows(shard, columns=columns, needed=None))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"k.txt.gz": b"a"}, "member 'k.txt.gz' is compressed"),
        ({"k.json": b"{"}, "member 'k.json': Expecting property name"),
        ({"k.json": b"[" * 200_000}, "member 'k.json': maximum recursion"),
        ({"k.cls": b"x"}, "member 'k.cls': invalid literal"),
        ({"k.txt": b"\xff"}, "member 'k.txt': .*can't decode"),
    ],
)
def test_damage_in_an_archive(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    (shard,) = open_shards([str(write_tar(tmp_path, "a.tar", members))], key="data_path")
    with pytest.raises(DataError, match=message):
        list(numbered_rows(shard, columns=None, needed=None))


def test_good_rows_before_the_damage_are_given(tmp_path: Path) -> None:
    (shard,) = open_shards([str(write(tmp_path, "a.jsonl", GOOD * 3 + b"{"))], key="data_path")
    rows = numbered_rows(shard, columns=["query", "positive"], needed=["query"])
    assert [next(rows) for _ in range(3)] == [(number, {"query": "a"}) for number in range(3)]
    with pytest.raises(DataError, match="line 4 is not valid JSON"):
        next(rows)


def test_a_field_that_a_row_lacks_is_null(tmp_path: Path) -> None:
    file = write(
        tmp_path, "a.jsonl", GOOD + b'{"query": "a", "positive": "b", "negatives": ["n"]}\n'
    )
    assert [row["negatives"] for row in rows_of(file)] == [None, ["n"]]


def test_short_csv_rows_end_in_empty_cells(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path, "a.csv", "query,positive\na\n"))[0]["positive"] == ""


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_with_other_columns_are_refused(tmp_path: Path, kind: str) -> None:
    for name, columns in (("a", ["query", "positive"]), ("b", ["query", "positive", "negatives"])):
        table = pa.table({column: ["x"] for column in columns})
        if kind == "parquet":
            pq.write_table(table, tmp_path / "a.parquet".replace("a.", f"{name}."))
        else:
            table.to_pandas().to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(
        DataError,
        match=rf"b.{kind}: has columns query, positive, negatives, and the first shard query",
    ):
        rows_of(tmp_path / f"a.{kind}", tmp_path / f"b.{kind}")


def test_the_identity_changes_with_the_data(tmp_path: Path) -> None:
    def identity(*contents: bytes) -> str:
        files = [write(tmp_path, f"{n}.jsonl", content) for n, content in enumerate(contents)]
        return identity_of(open_shards([str(file) for file in files], key="data_path"))

    long = GOOD * 2000
    edits = [
        (GOOD, GOOD),
        (GOOD,),
        (GOOD + GOOD,),
        (GOOD.replace(b"a", b"c"),),
        (long,),
        (long[:-4] + b'c"}\n',),
    ]
    assert len({identity(*edit) for edit in edits}) == len(edits)
    (tmp_path / "moved").mkdir()
    moved = write(tmp_path / "moved", "other.jsonl", GOOD)
    assert identity_of(open_shards([str(moved)], key="data_path")) == identity(GOOD)
    # Stated in the docs: an edit in the middle, of equal length, is not seen.
    middle = len(long) // 2
    assert identity(long[:middle] + b"x" + long[middle + 1 :]) == identity(long)


MEASURE = """
import resource, sys
from vembed_ds.data.shards import first_columns, numbered_rows, open_shards
from vembed_ds.errors import DataError
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
(shard,) = open_shards([sys.argv[1]], key="data_path")
try:
    outcome = sum(1 for _ in numbered_rows(shard, columns=["query", "positive"], needed=["query"]))
except DataError as error:
    outcome = error
print((peak() - before) // 1024, outcome)
"""


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_large_file_takes_little_memory(tmp_path: Path, name: str) -> None:
    row = {"query": "x" * 10_000, "positive": "b"}
    file = tmp_path / name
    if name == "a.parquet":
        pq.write_table(
            pa.Table.from_pylist([row | {"query": os.urandom(5000).hex()} for _ in range(20_000)]),
            file,
            row_group_size=1000,
        )
    else:
        line = f'{{"query": "{row["query"]}", "positive": "b"}}\n'
        text = f"query,positive\n{row['query']},b\n"
        with file.open("w") as stream:
            stream.write(text if name == "a.csv" else line)
            for _ in range(19_999):
                stream.write(text.partition("\n")[2] if name == "a.csv" else line)
    megabytes, outcome = measured(file)
    assert outcome == "20000"
    assert megabytes < 60  # of 200 MB


def test_a_quote_that_is_never_closed_takes_bounded_memory(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", 'query,positive\n"x,y\n' + ("z" * 99 + "\n") * 2_000_000)
    megabytes, outcome = measured(file)
    assert "line 2: field larger than field limit" in outcome
    assert megabytes < 600  # csv keeps four bytes per character


def measured(file: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    megabytes, _, outcome = done.stdout.strip().partition(" ")
    return int(megabytes), outcome
