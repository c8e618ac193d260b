"""The table, the JSON file and the picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vembed_ds.errors import ConfigError, DataError
from vembed_ds.evaluation.report import (
    GridRow,
    comparison_table,
    metrics_table,
    retrieval_grid,
    write_report,
)

GREEN = (26, 152, 80)


def test_comparison_table() -> None:
    before = {"recall@1": 0.004, "recall@10": 0.5, "mrr": 0.25, "num_queries": 9, "old": 1.0}
    after = {"recall@1": 0.25, "recall@10": 0.4, "mrr": 0.5, "num_queries": 10, "num_documents": 8}
    assert comparison_table(before, after).splitlines() == [
        "| metric    | before |  after |       change |",
        "| --------- | -----: | -----: | -----------: |",
        "| Recall@1  |  0.4 % | 25.0 % | +24.6 points |",
        "| Recall@10 | 50.0 % | 40.0 % | -10.0 points |",
        "| MRR       |  0.250 |  0.500 |       +0.250 |",
        "| queries   |      9 |     10 |           +1 |",
        "| documents |      - |      8 |            - |",
        "| old       |  1.000 |      - |            - |",
    ]


def test_metrics_table() -> None:
    assert metrics_table({"recall@5": 1.0, "num_queries": 3}).splitlines() == [
        "| metric   |   value |",
        "| -------- | ------: |",
        "| Recall@5 | 100.0 % |",
        "| queries  |       3 |",
    ]


def test_report_is_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_report(path, {"metrics": {"mrr": 0.5}, "data_path": "Überblick"})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "metrics": {"mrr": 0.5},
        "data_path": "Überblick",
    }


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be written .* choose another path"):
        write_report(tmp_path, {})


@pytest.fixture
def rows() -> list[GridRow]:
    red, blue = (Image.new("RGB", (12, 20), color) for color in ("red", "blue"))
    return [
        GridRow("a price of $5 and $6 in a long caption", [red, blue], [False, True]),
        GridRow(red, ["a text", blue], [False, False]),
    ]


def test_grid_frames_the_right_ones(tmp_path: Path, rows: list[GridRow]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "grid.png"
    retrieval_grid(path, rows=rows, headline="Recall@1: 50.0 %", subtitle="2 queries")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert (pixels[0] == 255).all()
    green = (pixels == GREEN).all(axis=2)
    top, bottom = green[: len(green) // 2 + 80], green[len(green) // 2 + 80 :]
    assert top.any()
    assert not bottom.any()
    across = np.flatnonzero(top.any(axis=0))
    assert across.min() > pixels.shape[1] / 2  # the second of two columns


def test_grid_errors(tmp_path: Path, rows: list[GridRow], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match="there are no queries to draw"):
        retrieval_grid(tmp_path / "grid.png", rows=[], headline="")
    with pytest.raises(DataError, match=r"grid\.docx: the picture cannot be written"):
        retrieval_grid(tmp_path / "grid.docx", rows=rows, headline="")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'vembed-ds\[evaluate\]'"):
        retrieval_grid(tmp_path / "grid.png", rows=rows, headline="")
