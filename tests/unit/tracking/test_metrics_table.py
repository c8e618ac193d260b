"""metrics.csv: a row per step, of what metrics.jsonl holds."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vembed_ds.errors import VembedError
from vembed_ds.tracking.trackers import Tracker, build_tracker


def start(folder: Path, **options: Any) -> Tracker:
    return build_tracker("none", folder=folder, run_name="r", config={}, **options)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def expected(folder: Path) -> list[dict[str, Any]]:
    """By plain Python, from metrics.jsonl."""
    found: dict[int, dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values["step"], {}).update(values)
    return list(found.values())


def check(folder: Path) -> None:
    wanted = expected(folder)
    columns = {name for row in wanted for name in row}
    found = rows(folder)
    assert [row.keys() for row in found] == [columns] * len(wanted)
    for row, values in zip(found, wanted, strict=True):
        for name in columns:
            value = values.get(name)
            assert row[name] == ("" if value is None else str(value)), (row, name)


def test_a_step_is_a_row_whatever_was_logged_of_it(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    tracker.log({"eval/recall@1": 0.25}, step=0)
    check(tmp_path)
    tracker.log({"train/loss": 0.5, "train/lr": 1e-5}, step=1)
    check(tmp_path)
    tracker.log({"train/loss": math.nan, "train/lr": 1e-5}, step=2)
    tracker.log({"eval/recall@1": 0.5, "perf/new, with a comma": 3}, step=2)
    check(tmp_path)
    tracker.log({"eval/recall@1": 0.75}, step=2)  # a shorter or a longer row takes its place
    tracker.log({"train/loss": 0.123456789}, step=3)
    tracker.log({"eval/recall@1": 1e-20, "train/lr": math.inf}, step=3)
    check(tmp_path)
    tracker.close()
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table.columns[:3]) == ["step", "eval/recall@1", "train/loss"]
    assert table["step"].tolist() == [0, 1, 2, 3]
    assert table["train/loss"].dropna().tolist() == [0.5, 0.123456789]


def test_only_new_columns_write_the_whole_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a million lines must not write all of them at every line."""
    tracker = start(tmp_path)
    table: Any = tracker.sinks["metrics.csv"]
    made = []
    rebuild = table._rebuild
    monkeypatch.setattr(table, "_rebuild", lambda: made.append(1) or rebuild())
    for step in range(1, 30):
        tracker.log({"train/loss": step}, step=step)
        if step % 10 == 0:
            tracker.log({"eval/mrr": step}, step=step)
    assert len(made) == 2
    check(tmp_path)


def test_resuming_removes_later_rows(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    for step in (1, 2, 3, 4):
        tracker.log({"train/loss": step} | ({"gone": 1} if step == 4 else {}), step=step)
    tracker.close()
    resumed = start(tmp_path, resume_step=2)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]
    assert "gone" not in rows(tmp_path)[0]
    resumed.log({"eval/mrr": 1}, step=2)
    resumed.log({"train/loss": 9}, step=3)
    check(tmp_path)
    start(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "step\n"


@pytest.mark.parametrize("by", ["the next line", "the end"])
def test_a_table_that_cannot_be_written_catches_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    tracker = start(tmp_path)
    tracker.log({"train/loss": 1}, step=1)
    path = tmp_path / "metrics.csv"
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        tracker.log({"train/loss": 2}, step=2)
        tracker.log({"train/loss": 3}, step=3)
    assert len(caplog.records) == 1
    assert "metrics.csv failed; training goes on, metrics.jsonl is complete" in caplog.text
    path.rmdir()
    if by == "the end":
        tracker.close()
    else:
        tracker.log({"train/loss": 3.5}, step=3)
    check(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_a_table_that_cannot_be_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(VembedError, match=r"metrics\.csv: cannot be written .* another output_dir"):
        start(tmp_path)
