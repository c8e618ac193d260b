"""Whole runs of vision-language models: every kind of item, restarted as an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.test_modes import NUM_RECORDS, records  # noqa: F401 (a fixture)
from tests.distributed.test_train import losses_of, run
from tests.parity.families import FAMILIES
from tests.worlds import World
from vembed_ds import Encoder, convert, evaluate
from vembed_ds.data.vision_language import VisionLanguageProcessor

pytestmark = [pytest.mark.distributed(2)]


@pytest.mark.parametrize(
    ("model_type", "mode", "loss"),
    [
        ("qwen3_vl", "m2i", "infonce"),
        ("qwen3_vl", "x2x", "infonce"),
        ("colqwen2", "t2i", "colbert"),
    ],
)
@pytest.mark.one_in(2)
def test_a_run_trains_alike_at_every_stage_and_converts(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,  # noqa: F811
    tmp_path: Path,
    model_type: str,
    mode: str,
    loss: str,
) -> None:
    FAMILIES[model_type].save(tmp_path / "tiny")
    data = str(records / ("some.jsonl" if "x" in mode else "all.jsonl"))
    common = {
        "model_name": str(tmp_path / "tiny"),
        "data_path": data,
        "val_data_path": data,
        "image_root": str(records),
        "retrieval_mode": mode,
        "loss_type": loss,
        "query_instruction": "Find the picture" if mode == "x2x" else "",
        "prompt": "Say what it is",
        "lr": 1e-2,
    }
    found = {}
    for stage in (0, 3):
        out = tmp_path / f"stage{stage}"
        results = run(world(2), make_config(output_dir=str(out), **common), stage)
        found[stage] = losses_of(out)
    assert found[3] == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) == 4
    assert convert.main([str(out), str(tmp_path / "model")]) == 0
    processor = Encoder(tmp_path / "model", device="cpu").processor
    assert isinstance(processor, VisionLanguageProcessor)
    assert processor.default_instruction == "Say what it is"
    report = tmp_path / "report.json"
    arguments = ["--model", str(tmp_path / "model"), "--data_path", data, "--output", str(report)]
    assert evaluate.main([*arguments, "--config_override", "num_workers=0"]) == 0
    metrics = json.loads(report.read_text())["metrics"]
    trained = {k.removeprefix("eval/"): v for k, v in results[0]["metrics"].items()}
    assert {name: metrics[name] for name in trained} == pytest.approx(trained, rel=1e-4)
    assert metrics["num_queries"] == NUM_RECORDS
