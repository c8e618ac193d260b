"""A table that runs share: of one model only, whole, and extended by what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.letters import LetterTeacher, keys_of, letter_data, vector_of
from vembed_ds.data.vector_table import VectorTable
from vembed_ds.errors import DataError, VembedError
from vembed_ds.teachers.cache import ensure_cache, open_cache

IDENTITY = {
    "name": "big/model",
    "revision": "main",
    "weights": "1234",
    "processor": "abcd",
    "query_instruction": "query: ",
    "precision": "fp32",
}
Write = Callable[..., str]


def test_a_cache_of_another_teacher_is_refused(tmp_path: Path) -> None:
    assert open_cache(tmp_path / "cache", identity=IDENTITY) is None
    ensure_cache(tmp_path / "cache", identity=IDENTITY)
    renamed = {**IDENTITY, "name": "./copy", "revision": None}
    assert isinstance(open_cache(tmp_path / "cache", identity=renamed), VectorTable)
    other = {**IDENTITY, "weights": "9999", "query_instruction": "find "}
    with pytest.raises(DataError) as caught:
        open_cache(tmp_path / "cache", identity=other)
    assert str(caught.value) == (
        f"teacher_cache={tmp_path / 'cache'}: holds the vectors of another teacher, fc3c5611e1a4; "
        "this one is 182f1fffe6f2: query_instruction was 'query: ', is 'find '; weights was '1234', "
        "is '9999'; name another folder, or delete this one"
    )


def test_only_what_is_missing_is_embedded(tmp_path: Path, write_jsonl: Write) -> None:
    teacher = LetterTeacher()

    def run(*rows: dict[str, Any]) -> tuple[VectorTable, int]:
        path = write_jsonl(
            [{"negatives": [], **row} for row in rows], f"{len(teacher.embedded)}.jsonl"
        )
        return teacher.precompute(letter_data(path), folder=tmp_path / "cache")

    table, embedded = run({"query": "one", "positive": "two"}, {"query": "one", "positive": "six"})
    assert (embedded, sorted(teacher.embedded)) == (3, ["one", "six", "two"])
    table, embedded = run({"query": "one", "positive": "ten", "negatives": ["two", "a"]})
    assert (embedded, sorted(teacher.embedded[3:])) == (2, ["a", "ten"])
    assert (len(table), len(table.segments)) == (5, 2)
    for text in ("one", "two", "six", "ten", "a"):
        assert table.lookup(keys_of([text]))[0].tolist() == vector_of(text)
    calls = teacher.calls
    table, embedded = run({"query": "ten", "positive": "six"})
    assert (embedded, teacher.calls) == (0, calls)


def test_a_cache_is_read_before_it_is_used(tmp_path: Path, write_jsonl: Write) -> None:
    data = letter_data(write_jsonl([{"query": "one", "positive": "two"}]))
    teacher = LetterTeacher()
    teacher.precompute(data, folder=tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("segment-*/vectors.npy")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"vectors\.npy: differs from what was written; delete"):
        teacher.precompute(data, folder=tmp_path / "cache")


def test_a_folder_that_cannot_be_written(tmp_path: Path, write_jsonl: Write) -> None:
    data = letter_data(write_jsonl([{"query": "one", "positive": "two"}]))
    (tmp_path / "file").touch()
    with pytest.raises(VembedError, match=r"writing .*file/cache: .*Not a directory"):
        LetterTeacher().precompute(data, folder=tmp_path / "file" / "cache")
