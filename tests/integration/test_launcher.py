"""The commands of the README through the real launcher; few, because each starts a world."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
TRAIN = [*DEEPSPEED, "--module", "vembed_ds.train"]
SHORT = ["max_steps=2", "logging_steps=1", "warmup_steps=1", "val_data_path=null", "eval_steps=0"]

pytestmark = [pytest.mark.slow, pytest.mark.distributed(2)]


def launch(*arguments: str, port: int) -> subprocess.CompletedProcess[str]:
    command = [*TRAIN[:5], "--master_port", str(port), *TRAIN[5:], *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=280)


def test_the_example_starts_with_one_loss_at_every_stage(tmp_path: Path) -> None:
    first = []
    for stage in (0, 1, 2, 3):
        out = tmp_path / str(stage)
        done = launch(
            "--ds_config",
            f"ds_configs/zero{stage}.json",
            "--config",
            "examples/emoji/t2i.yaml",
            "--config_override",
            f"output_dir={out}",
            *SHORT,
            port=29_600 + stage,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        first.append(f"{lines[0]['train/loss']:.5f}")
        assert lines[0]["step"] == 1
        assert f"step 1: train/loss={lines[0]['train/loss']:.6g}" in done.stderr
    assert len(set(first)) == 1, first


def test_a_mistake_ends_every_rank_with_its_message_and_an_exit_code(tmp_path: Path) -> None:
    done = launch(
        "--ds_config",
        "ds_configs/zero2.json",
        "--config",
        "examples/emoji/t2i.yaml",
        "--config_override",
        "graident_cache=true",
        f"output_dir={tmp_path}",
        port=29_610,
    )
    assert done.returncode != 0
    assert "vembed_ds: rank 0: ConfigError: " in done.stderr
    assert "graident_cache" in done.stderr
    assert "Traceback" not in done.stderr
