from __future__ import annotations

import gc
import gzip
import mmap
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from tests.archives import write_tar
from tests.memory import measure
from vembed_ds.data.fingerprint import _update_bytes, fingerprint
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.data.shards import first_columns, numbered_rows, open_shards
from vembed_ds.errors import DataError

ROWS = [{"query": "a/b", "positive": "x"}, {"query": "ü, c", "positive": "007"}]
WriteJsonl = Callable[..., str]


def load(*paths: str | Path, key: str = "data_path") -> datasets.Dataset:
    return load_table([str(path) for path in paths], key=key)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def png() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (3, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_every_format_gives_the_same_rows(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    files = [
        write_jsonl(ROWS),
        write(
            tmp_path, "a.json", '[{"query":"a/b","positive":"x"},{"query":"ü, c","positive":"007"}]'
        ),
        write(tmp_path, "a.csv", 'query,positive\na/b,x\n"ü, c",007\n'),
        write(tmp_path, "bom.csv", '\ufeffquery,positive\r\na/b,x\r\n"ü, c",007\r\n'),
        write(tmp_path, "a.TSV", "query\tpositive\na/b\tx\nü, c\t007\n"),
        tmp_path / "a.parquet",
    ]
    for file in files:
        assert load(file).to_list() == ROWS


def test_csv_cells_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", "query,positive\nNA,null\n007,1.50\nTrue,\n")
    assert load(file)["query"][:] == ["NA", "007", "True"]
    assert load(file)["positive"][:] == ["null", "1.50", ""]


def test_several_files_are_concatenated_in_order(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    other = write(tmp_path, "b.csv", "positive,query\np,q\n")
    assert load(write_jsonl(ROWS), other).to_list() == [*ROWS, {"query": "q", "positive": "p"}]


def test_large_and_plain_strings_are_the_same_type(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    schema = pa.schema([("query", pa.large_string()), ("positive", pa.string())])
    pq.write_table(pa.Table.from_pylist(ROWS, schema=schema), tmp_path / "a.parquet")
    assert load(write_jsonl(ROWS), tmp_path / "a.parquet").num_rows == 4


def test_files_with_other_columns_or_types_are_refused(
    tmp_path: Path, write_jsonl: WriteJsonl
) -> None:
    first = write_jsonl(ROWS)
    for row in ({"query": "a"}, {"query": "a", "positive": 3}):
        second = write_jsonl([row], "second.jsonl")
        with pytest.raises(
            DataError, match=r"train.jsonl has columns .*second.jsonl has .*the same columns"
        ):
            load(first, second)


def test_folder_saved_to_disk(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict(
        {"train": table, "validation": table.select([0]), "test": table.select([1])}
    )
    splits.save_to_disk(tmp_path / "all")
    assert load(tmp_path / "one").to_list() == ROWS
    assert load(tmp_path / "one", key="val_data_path").to_list() == ROWS
    assert load(tmp_path / "all").to_list() == ROWS
    assert load(tmp_path / "all", key="val_data_path").to_list() == ROWS[:1]


def test_test_split_stands_in_for_validation(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder)
    assert load(folder, key="val_data_path").num_rows == 2
    with pytest.raises(
        DataError, match=r"data_path=.*all: no split train; it has test; give data_path"
    ):
        load(folder)


def test_folder_of_data_files(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "query,positive\na,b\n")
    assert load(tmp_path).num_rows == 1
    with pytest.raises(DataError, match="no split validation or test; it has train"):
        load(tmp_path, key="val_data_path")


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder cannot be read as data"):
        load(tmp_path)


def test_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"org/pairs": splits}[name])
    assert load("org/pairs").to_list() == ROWS


def test_unreachable_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = (
        "data_path=org/pairs: neither a file, a folder nor a data set .*Couldn't reach the Hub"
    )
    with pytest.raises(DataError, match=message):
        load("org/pairs")


def test_no_paths() -> None:
    with pytest.raises(DataError, match="val_data_path names no data"):
        load(key="val_data_path")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data_path=.*none.jsonl: file does not exist; correct data_path"
    ):
        load(tmp_path / "none.jsonl")


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"suffix '.txt' is not one of .jsonl, .json, .csv, .tsv"):
        load(write(tmp_path, "a.txt", "hello"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n"), ("a.csv", "query,positive\n"), ("a.json", "[]")],
)
def test_no_records(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match="holds no records"):
        load(write(tmp_path, name, content))


def test_parquet_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: holds no records"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"query": "c", "posi', r"line 3 is not valid JSON"),
        (
            b'{"query": "\xff", "posi',
            r"line 3 is not UTF-8 .*codec can't decode.*; save the file as UTF-8",
        ),
        (b'["a", "b"]', r"line 3 is list, not a JSON object"),
        (b"3", r"line 3 is int, not a JSON object"),
    ],
)
def test_broken_json_line_is_named(tmp_path: Path, bad: bytes, message: str) -> None:
    good = b'{"query": "a", "positive": "b"}\n'
    file = write(tmp_path, "a.jsonl", good + b"\n" + bad + b"\n" + good)
    with pytest.raises(DataError, match=rf"data_path=.*a.jsonl: {message}"):
        load(file)


def test_broken_json_array(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.json: .*; correct the file"):
        load(write(tmp_path, "a.json", '[{"query": "a"}, {"query": ]'))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("query,positive\na,b\nc,d,e\n", "Expected 2 fields in line 3, saw 3"),
        ("query,positive\na,b,c\n", "Expected 2 fields in line 2, saw 3"),
        ('query,positive\na,b\n"c,d\n', "EOF inside string"),
        ("query,query\na,b\n", "a column name occurs twice"),
        (b"query,positive\n\xff\xfe,b\n", "codec can't decode"),
        ("\n\n", "No columns to parse"),
    ],
)
def test_broken_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"data_path=.*a.csv: .*{message}"):
        load(write(tmp_path, "a.csv", content))


def test_short_csv_row_leaves_an_empty_cell(tmp_path: Path) -> None:
    assert load(write(tmp_path, "a.csv", "query,positive\na\n"))[0]["positive"] == ""


def save_with_maps(path: Path, *names: str) -> None:
    """Two maps, one inside another type, beside columns of texts."""
    pairs = pa.array([[("k", "v")]], type=pa.map_(pa.string(), pa.string()))
    columns = {name: pa.array(["a"]) for name in names}
    columns |= {"meta": pairs, "more": pa.StructArray.from_arrays([pairs], ["inner"])}
    pq.write_table(pa.table(columns), path)


def test_parquet_columns_of_types_that_nothing_reads_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_with_maps(tmp_path / "a.parquet", "query", "positive")
    for name in ("a.parquet", "*.parquet"):
        assert load(tmp_path / name).to_list() == [{"query": "a", "positive": "a"}]
    assert "left out, as no type that can be read: 'meta' (map<string, string" in caplog.text
    (shard,) = open_shards([str(tmp_path / "a.parquet")], key="data_path")
    columns = first_columns([shard])
    rows = list(numbered_rows(shard, columns=columns, needed=["query"]))
    assert rows == [(0, {"query": "a"})]


def test_parquet_of_nothing_but_such_columns(tmp_path: Path) -> None:
    save_with_maps(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no column can be read: 'meta' \(map<string"):
        load(tmp_path / "a.parquet")


def test_a_folder_with_such_a_column_names_it(tmp_path: Path) -> None:
    save_with_maps(tmp_path / "a.parquet", "query")
    with pytest.raises(
        DataError,
        match=r"a.parquet: column 'meta' is of type map<string, string.*; remove it, or give the "
        r"files, data_path: .*/\*.parquet, of which such columns are left out",
    ):
        load(tmp_path)


def test_broken_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.parquet: Parquet .*; correct the file"):
        load(write(tmp_path, "a.parquet", "hello"))


def test_image_columns_stay_encoded(tmp_path: Path) -> None:
    features = datasets.Features({"query": datasets.Value("string"), "image": datasets.Image()})
    rows = [{"query": "a", "image": {"bytes": png(), "path": "a.png"}}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet")[0]["image"] == {"bytes": png(), "path": "a.png"}


def test_binary_columns_stay_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["a"], "image": [png()]}), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet")[0]["image"] == png()


def test_table_is_memory_mapped(tmp_path: Path) -> None:
    text = "x" * 10_000
    pq.write_table(
        pa.table({"query": [text] * 3000, "positive": [text] * 3000}),
        tmp_path / "a.parquet",
        row_group_size=100,
    )
    gc.collect()
    before = pa.total_allocated_bytes()
    table = load(tmp_path / "a.parquet").select_columns(["query"])
    gc.collect()
    assert table[2999]["query"] == text
    assert table.data.nbytes > 29_000_000
    assert pa.total_allocated_bytes() - before < 3_000_000
    mapped = [Path(entry["filename"]) for entry in table.cache_files]
    assert sum(file.stat().st_size for file in mapped) > 29_000_000 > mmap.PAGESIZE


def test_progress_bars_and_log_level_are_restored(write_jsonl: WriteJsonl) -> None:
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    load(write_jsonl(ROWS))
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == level


@pytest.mark.parametrize(("terminal", "rank"), [(True, "0"), (True, "1"), (False, "0")])
def test_converting_is_watched_on_rank_0s_terminal(
    write_jsonl: WriteJsonl,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    rank: str,
) -> None:
    datasets.enable_progress_bars()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    load(write_jsonl(ROWS))
    assert ("Generating train split" in capsys.readouterr().err) == (terminal and rank == "0")
    assert not datasets.are_progress_bars_disabled()


def table_of(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def test_fingerprint_is_the_same_in_another_process(
    write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    file = write_jsonl(ROWS)
    program = (
        "import sys; from vembed_ds.data.fingerprint import fingerprint;"
        "from vembed_ds.data.readers import load_table;"
        "sys.stdout.write(fingerprint(load_table([sys.argv[1]], key='data_path')))"
    )
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "HF_DATASETS_CACHE": str(tmp_path / "other"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, file],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == fingerprint(load(file))


def test_fingerprint_ignores_how_the_rows_are_stored() -> None:
    rows = [{"query": f"q{i}", "positive": "p" * i} for i in range(50)]
    whole = fingerprint(table_of(rows))
    parts = datasets.concatenate_datasets([table_of(rows[:13]), table_of(rows[13:])])
    assert fingerprint(parts) == whole
    assert fingerprint(table_of(rows[::-1]).select(range(49, -1, -1))) == whole
    assert (
        fingerprint(table_of([{"query": "extra", "positive": "p"}, *rows]).select(range(1, 51)))
        == whole
    )
    wide = datasets.Features(
        {"query": datasets.Value("large_string"), "positive": datasets.Value("string")}
    )
    assert fingerprint(table_of(rows).cast(wide)) == whole
    longer = table_of([{"query": "extra", "positive": "p"}, *rows, rows[0]]).cast(wide)
    assert fingerprint(longer.select(range(1, 51))) == whole


@pytest.mark.parametrize(
    "rows",
    [
        [{"query": "a", "positive": "b"}, {"query": "c", "positive": "D"}],
        [{"query": "c", "positive": "d"}, {"query": "a", "positive": "b"}],
        [{"query": "a", "positive": "b"}],
        [{"query": "ac", "positive": "b"}, {"query": "", "positive": "d"}],
        [{"query": "a", "positive": "b"}, {"query": "c", "positive": None}],
        [{"query": "a", "positive": "b"}, {"query": "c", "positive": ""}],
        [{"query": "a", "text": "b"}, {"query": "c", "text": "d"}],
    ],
)
def test_fingerprint_changes_with_every_edit(rows: list[dict[str, Any]]) -> None:
    original = table_of([{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}])
    assert fingerprint(table_of(rows)) != fingerprint(original)


def test_fingerprint_covers_images_and_numbers() -> None:
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.Value("int64")}
    )

    def of(data: bytes | None, path: str | None, label: int) -> str:
        rows = [{"image": {"bytes": data, "path": path}, "label": label}]
        return fingerprint(datasets.Dataset.from_list(rows, features=features))

    values = [
        of(b"1", "a", 0),
        of(b"2", "a", 0),
        of(b"1", "b", 0),
        of(b"1", "a", 1),
        of(None, "a", 0),
    ]
    assert len(set(values)) == 5
    assert of(b"1", "a", 0) == values[0]


def test_fingerprint_ignores_bytes_hidden_under_a_null() -> None:
    offsets = pa.py_buffer(np.array([0, 1, 2], np.int32))
    validity = pa.py_buffer(b"\x01")

    def of(data: bytes) -> str:
        column = pa.Array.from_buffers(pa.string(), 2, [validity, offsets, pa.py_buffer(data)])
        return fingerprint(datasets.Dataset(pa.table({"query": column})))

    assert of(b"ab") == of(b"ac") != of(b"bb")


def test_byte_hash_of_a_slice_covers_just_the_slice() -> None:
    def of(column: pa.Array) -> str:
        digest = xxhash.xxh3_128()
        _update_bytes(digest, column)
        return digest.hexdigest()

    whole = pa.array(["zero", "one", "two", "three"], pa.large_string())
    assert of(whole.slice(1, 2)) == of(pa.array(["one", "two"]))


def test_a_tsv_text_that_swallows_lines_is_refused(tmp_path: Path) -> None:
    rows = 'query\tpositive\n"so" he said\ta\nb\tc\n"d\te\nf\tg\n"h\ti\n'
    with pytest.raises(DataError, match=r"a\.tsv: 5 lines, but \d records: a text that starts"):
        load(write(tmp_path, "a.tsv", rows))
    assert load(write(tmp_path, "b.TSV", 'query\tpositive\r\n"""d"" e"\tf\r\n\r\n')).num_rows == 1


GOOD = b'{"query": "a", "positive": "b"}\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str) -> None:
    assert load(write(tmp_path, name, b"\xef\xbb\xbf" + GOOD)).to_list() == [
        {"query": "a", "positive": "b"}
    ]


def nested(depth: int) -> bytes:
    return b'{"query": ' + b"[" * depth + b"]" * depth + b"}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1 is UTF-16; save the file as UTF-8"),
        (
            "a.jsonl",
            GOOD + b"\0" * 9 + b"\n",
            "line 2 holds a NUL byte, so that the file is damaged",
        ),
        ("a.csv", b"query,positive\na\0,b\n", "line 2 holds a NUL byte"),
        ("a.csv", b"query,positive\n" + b"a,b\n" * 5 + b"\xe4,b\n", "line 7 is not UTF-8"),
        ("a.jsonl", GOOD + nested(65), "line 2 is nested more than 64 levels deep; flatten it"),
        # Arrow's parser ends the process without a word on these.
        ("a.jsonl", GOOD + nested(200_000), "line 2 is nested more than 64 levels deep"),
        ("a.jsonl", b'{"query": ' + b"[\n" * 200_000, "line 64 is nested more than 64"),
        ("a.json", b"[" + nested(200_000) + b"]", "is nested more than 64 levels deep"),
        (
            "a.jsonl",
            GOOD + b'{"query": "a", "query": "b"}\n',
            "query.* was specified twice in row 1",
        ),
        ("a.jsonl", GOOD + b'{"query": "\\ud800"}\n', "surrogate pair in string is invalid"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-9], "cannot be read .*; replace the file"),
        ("a.jsonl.gz", gzip.compress(GOOD * 100_000), "grows to more than 200 times its size"),
        (
            "a.json.gz",
            gzip.compress(b"[" + GOOD + b"]"),
            "is one JSON array; save it as JSON lines",
        ),
    ],
)
def test_damaged_files_are_refused_by_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(
        DataError, match=rf"data_path=.*{name}: {message}|{message}.*; correct the file"
    ):
        load(write(tmp_path, name, content))


def test_brackets_in_texts_do_not_nest(tmp_path: Path) -> None:
    text = "[{" * 200 + '\\" \\\\'
    content = b'{"query": "' + text.encode() + b'", "positive": "b"}\n'
    assert load(write(tmp_path, "a.jsonl", content)).num_rows == 1
    assert load(write(tmp_path, "b.json", b"[" + content + b"]")).num_rows == 1


@pytest.mark.parametrize(
    ("row", "kind"),
    [({"query": 3, "positive": "b"}, "int"), ({"query": {"a": 1}, "positive": "b"}, "dict")],
)
def test_mixed_types_in_a_column_are_refused_by_record(
    tmp_path: Path, write_jsonl: WriteJsonl, row: dict[str, Any], kind: str
) -> None:
    table = load(write_jsonl([*ROWS, row]))
    reader = RecordReader(
        table.column_names, retrieval_mode="t2t", column_mapping={}, image_root="", origin="a.jsonl"
    )
    assert reader.read(table[0], 0).query.text == "a/b"
    with pytest.raises(
        DataError, match=f"a.jsonl, record 2, column 'query': .* is {kind}, not text"
    ):
        reader.read(table[2], 2)


READ = """
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
try:
    outcome = len(load_table([sys.argv[1]], key="data_path")[1]["query"])
except DataError as error:
    outcome = str(error)
"""


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        (50_000_000, 600, "50000000"),
        (2**26, 300, "line 3 is longer than 64 MiB; put images into files of their own"),
    ],
)
def test_long_lines_take_bounded_memory(
    tmp_path: Path, name: str, size: int, limit: int, expected: str
) -> None:
    line = b'{"query": "%b", "positive": "b"}\n' if name == "a.jsonl" else b"%b,b\n"
    head = b"" if name == "a.jsonl" else b"query,positive\n"
    lines = [line % b"a", line % (b"x" * size)]
    if "longer" in expected:
        lines.insert(0, line % b"a" if name == "a.jsonl" else b"")
        lines.append((line % b"y") * 10)
    file = write(tmp_path, name, head + b"".join(lines))
    imports = (
        "import datasets\nfrom vembed_ds.data.readers import load_table\n"
        "from vembed_ds.errors import DataError"
    )
    megabytes, outcome = measure(imports, READ, str(file), str(tmp_path / "cache"))
    assert outcome.endswith(expected)
    assert megabytes < limit


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.tsv.GZ"])
def test_compressed_files(tmp_path: Path, name: str) -> None:
    texts = {
        "jsonl": GOOD.decode(),
        "csv": "query,positive\na,b\n",
        "tsv": "query\tpositive\na\tb\n",
    }
    file = write(tmp_path, name, gzip.compress(texts[name.split(".")[1]].encode()))
    assert load(file).to_list() == [{"query": "a", "positive": "b"}]


def test_a_folder_is_checked_too(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", GOOD + nested(200_000))
    with pytest.raises(DataError, match=r"a.jsonl: line 2 is nested more than 64"):
        load(tmp_path)


def test_a_pipe_is_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl: is no regular file; give a file, a folder or"):
        load(tmp_path / "a.jsonl")


def pairs_shard(folder: Path, name: str, keys: Sequence[str]) -> Path:
    return write_tar(
        folder,
        name,
        {
            f"{key}.{kind}": content
            for key in keys
            for kind, content in (
                ("png", png()),
                ("txt", f"text {key}".encode()),
                ("json", f'{{"caption": "caption {key}", "label": 3}}'.encode()),
            )
        },
    )


def test_webdataset_shards(tmp_path: Path) -> None:
    for number in range(3):
        pairs_shard(tmp_path, f"s-{number:04d}.tar", [f"k{number}0", f"k{number}1"])
    texts = [f"text k{number}{place}" for number in range(3) for place in range(2)]
    for pattern in ("s-{0000..0002}.tar", "s-*.tar", ""):
        table = load(tmp_path / pattern)
        assert table["txt"][:] == texts
    reader = RecordReader(
        table.column_names,
        retrieval_mode="t2i",
        column_mapping={"query": "json.caption", "positive_image": "png", "label": "json.label"},
        image_root="",
        origin="s.tar",
    )
    record = reader.read(table[3], 3)
    assert record.query.text == "caption k11"
    assert record.positive.image == png()
    assert record.label == 3


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    pairs_shard(tmp_path, "s-0.tar", ["a"])
    with pytest.raises(
        DataError, match=r"data_path=.*s-\{0..1\}.tar: .*s-1.tar: file does not exist"
    ):
        load(tmp_path / "s-{0..1}.tar")
    with pytest.raises(DataError, match=r"t-\*.tar: file does not exist; correct data_path"):
        load(tmp_path / "t-*.tar")


def test_nothing_of_an_archive_is_extracted(tmp_path: Path) -> None:
    file = write_tar(tmp_path, "a.tar", {"../../evil.txt": b"a", "/abs.txt": b"b"})
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = {path for path in tmp_path.parent.rglob("*") if "cache" not in str(path)}
    assert load(file)["txt"][:] == ["a", "b"]
    assert {path for path in tmp_path.parent.rglob("*") if "cache" not in str(path)} == before


def sparse(folder: Path) -> Path:
    """An archive of 2 KB with a member of 8 TB, in GNU's sparse format."""
    info = tarfile.TarInfo("k.txt")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"\x80" + (2**43).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (folder / "a.tar").write_bytes(bytes(header) + b"x" * 512 + b"\0" * 1024)
    return folder / "a.tar"


def test_archives_that_swell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.tar: member 'k.txt' is sparse or larger than 1 GiB"):
        load(sparse(tmp_path))
    file = write_tar(tmp_path, "b.tar", {"k.txt.gz": gzip.compress(b"a")})
    with pytest.raises(
        DataError, match=r"b.tar: member 'k.txt.gz' is compressed; store it as it is"
    ):
        load(file)


def test_broken_archives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.tar: cannot be read \(.*\); replace the file"):
        load(write(tmp_path, "a.tar", b"hello" * 1000))
    with pytest.raises(
        DataError, match=r"b.tar: .*don't share the same prefix.*; correct the file"
    ):
        load(write_tar(tmp_path, "b.tar", {"a.txt": b"a", "b.png": png()}))
