"""What a run logs, against plain NumPy on what its ranks embedded; and docs/follow.md against it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import ROOT
from tests.distributed.test_train import ds_file, metrics_of
from tests.worlds import World

RUN = "tests.distributed.follow_cases:run_seen"
# In docs/follow.md, and only of runs that this file does not start.
ELSEWHERE = {
    "train/logit_bias",
    "train/loss_task",
    "train/loss_distillation",
    "train/loss_teacher_NAME",
    "train/loss_data_NAME",
    "train/loss_[layer_N_]dim_N",
    "perf/peak_memory_bytes",
}


def run(world: World, config: str, stage: int = 2, **more: Any) -> list[dict[str, Any]]:
    results = world.run(RUN, config=config, ds_config=ds_file(stage), **more)
    for result in results:
        assert "error" not in result, result["error"]
    return results


def unit(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def logged(ranks: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """A log line of one step, by NumPy, from what every rank saw of it."""
    query, positive = (
        [unit(rank["rows"][role]) for rank in ranks] for role in ("query", "positive")
    )
    scale = math.exp(ranks[0]["scale"])
    every_query, every_positive = np.concatenate(query), np.concatenate(positive)
    table = scale * every_query @ every_positive.T
    right = np.diagonal(table)
    forth, back = (float(np.mean(np.log(np.exp(t).sum(axis=1)) - right)) for t in (table, table.T))
    found = {
        "train/loss": (forth + back) / 2,
        "train/loss_query_to_doc": forth,
        "train/loss_doc_to_query": back,
        "train/temperature": 1 / scale,
        "train/in_batch_accuracy": float(np.mean(table.argmax(axis=1) == np.arange(len(table)))),
        "embeddings/alignment": float(np.mean(((every_query - every_positive) ** 2).sum(axis=1))),
        "train/lr": ranks[0]["rates"][0],
    }
    uniformity = []
    for role, units in (("query", query), ("positive", positive)):
        norms = [np.linalg.norm(rank["rows"][role], axis=1) for rank in ranks]
        found[f"embeddings/{role}_norm"] = float(np.mean(norms))
        off = ~np.eye(batch, dtype=bool)
        cosines = [(u @ u.T)[off] for u in units]
        found[f"embeddings/{role}_mean_cosine"] = float(np.mean(cosines))
        shares = [(s := np.linalg.svd(u, compute_uv=False)) / s.sum() for u in units]
        entropies = [-np.sum(p[p > 1e-9] * np.log(p[p > 1e-9])) for p in shares]
        found[f"embeddings/{role}_effective_rank"] = float(np.mean(np.exp(entropies)))
        uniformity.append(np.log(np.mean(np.exp(-2 * (2 - 2 * np.array(cosines))))))
    found["embeddings/uniformity"] = float(np.mean(uniformity))
    tokens = padded = chunks = replayed = 0
    for rank in ranks:
        tokens += sum(rank["lengths"]["text"])
        for chunk in rank["chunks"]:
            own = rank["lengths"]["text"][chunk["text"]] if "text" in chunk else []
            padded += len(own) * max(own, default=0)
        chunks += len(rank["chunks"])
        replayed += len(rank["chunks"]) - rank["kept"]
    found["perf/padding_ratio"] = padded / tokens
    found["perf/recompute_share"] = replayed / chunks
    return found


def test_every_value_is_that_of_plain_numpy_over_all_ranks(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    options = {"text_encoder_lr": 2e-3, "seed": 3, "save_steps": 2, "eval_steps": 2}
    config = make_config(**options, gradient_cache_kept_graphs=1, encode_duplicates_once=False)
    results = run(world(2), config)
    lines = {line["step"]: line for line in metrics_of(tmp_path / "out") if "train/loss" in line}
    assert list(lines) == [1, 2, 3, 4]
    assert [result["gathers"] for result in results] == [4, 4], "one exchange per log line"
    for step, line in lines.items():
        ranks = [
            next(s for s in reversed(result["seen"]) if s["step"] == step) for result in results
        ]
        expected = logged(ranks, batch=4)
        found = {name: line[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), step
        assert line["train/lr_text_encoder"] == pytest.approx(2 * line["train/lr"], rel=1e-6)
        # 8 pairs of 2 ranks and their tokens took the same seconds.
        tokens = sum(sum(rank["lengths"]["text"]) for rank in ranks)
        seconds = line["perf/step_seconds"]
        assert line["train/samples_per_second"] == pytest.approx(8 / seconds)
        assert line["perf/tokens_per_second"] == pytest.approx(tokens / seconds)
        assert line["perf/patches_per_second"] == pytest.approx(line["train/samples_per_second"])
        assert line["perf/data_wait_seconds_max"] >= line["train/data_wait_seconds"] > 0
        assert line["perf/peak_host_memory_bytes"] > 1e8
        # Half of what is reduced for all, of what is updated, and of 16 gathered embeddings and
        # their gradient, which gloo reduces for all.
        width = ranks[0]["rows"]["query"].shape[1]
        sent = 4 * (3 * results[0]["trained"] + 3 * 16 * width) / 2
        assert line["perf/predicted_bytes_per_step"] == pytest.approx(sent)
        # A step of the optimizer writes what it has: evaluation and checkpoint of the steps before.
        assert ("perf/evaluation_seconds" in line) == (step in (1, 3))
        assert ("perf/checkpoint_seconds" in line) == (step == 3)
    assert_documented(lines.values(), metrics_of(tmp_path / "out"))


def test_logging_changes_no_bit(
    world: Callable[[int], World], make_config: Callable[..., str]
) -> None:
    found = []
    for steps in (1, 100):
        config = make_config(logging_steps=steps, val_data_path=None)
        results = run(world(2), config)
        found.append(
            [
                (
                    [float(s["loss"]) for s in result["seen"] if "loss" in s],
                    result["weights"],
                    result["random"],
                )
                for result in results
            ]
        )
        assert [result["gathers"] for result in results] == [4 if steps == 1 else 2] * 2
    assert found[0] == found[1]


def assert_documented(lines: Any, every_line: Any) -> None:
    """All that was written stands in the table, and all of the table was written."""
    text = (ROOT / "docs" / "follow.md").read_text()
    rows = re.findall(r"^\| `((?:train|embeddings|perf|eval)/[^`]+)` \|", text, flags=re.M)
    assert len(rows) == len(set(rows)) > 30
    patterns = {row: _pattern(row) for row in rows}
    written = {name for line in every_line for name in line} - {"step"}
    matched: set[str] = set()
    for name in written:
        found = [row for row, pattern in patterns.items() if re.fullmatch(pattern, name)]
        assert len(found) == 1, (name, found)
        matched |= set(found)
    assert set(rows) - matched == ELSEWHERE
    assert set(rows) >= ELSEWHERE


def _pattern(row: str) -> str:
    """``N`` is a number, ``NAME`` a word; what stands in brackets may be missing."""
    pattern = re.escape(row).replace(r"\[", "(?:").replace(r"\]", ")?")
    return pattern.replace("NAME", r"[\w.-]+").replace("N", r"\d+")
