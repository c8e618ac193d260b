"""What peers train: repeated texts, lengths, and what everybody reads of them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.task import Task, read_tensors, write_task

TINY = Task().small()


def pairs(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_texts_and_tensors_are_the_same(tmp_path: Path) -> None:
    write_task(TINY, tmp_path)
    ids = read_tensors(tmp_path)["positive"]["input_ids"]
    assert ids.shape == (TINY.pairs, TINY.length)
    words = pairs(tmp_path)[3]["positive"].split()
    assert words[:-1] == [f"w{number}" for number in ids[3, :-1].tolist()]


def test_a_share_of_the_texts_is_repeated(tmp_path: Path) -> None:
    write_task(Task(repeated=0.75).small(), tmp_path)
    for role in ("query", "positive"):
        assert len({pair[role] for pair in pairs(tmp_path)}) == TINY.pairs / 4
