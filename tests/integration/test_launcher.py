"""The commands of the README through the real launcher; few, because each starts a world."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent.parent
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
SHORT = ["max_steps=2", "logging_steps=1", "warmup_steps=1", "val_data_path=null", "eval_steps=0"]

pytestmark = [pytest.mark.slow, pytest.mark.distributed(2)]


def train(*arguments: str) -> list[str]:
    """The command on 2 ranks, at a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [*DEEPSPEED, "--master_port", port, "--module", "vembed_ds.train", *arguments]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(train(*arguments), cwd=ROOT, text=True, capture_output=True, timeout=280)


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
        )
        assert done.returncode == 0, done.stderr[-3000:]
        port = done.args[done.args.index("--master_port") + 1]
        assert not list(Path("/dev/shm").glob(f"deepspeed*_{port}_*")), "nobody gives it back"
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
    )
    assert done.returncode != 0
    assert "vembed_ds: rank 0: ConfigError: " in done.stderr
    assert "graident_cache" in done.stderr
    assert "Traceback" not in done.stderr


def test_overrides_may_be_given_in_several_flags(tmp_path: Path) -> None:
    done = launch(
        *("--ds_config", "ds_configs/zero2.json", "--config", "examples/emoji/t2i.yaml"),
        *("--config_override", "first_typo=1"),
        *("--config_override", "second_typo=1", f"output_dir={tmp_path}"),
    )
    assert "first_typo" in done.stderr
    assert "second_typo" in done.stderr


def test_a_killed_run_ends_and_resumes_with_the_losses_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    table = pq.read_table(ROOT / "examples" / "emoji" / "noto.parquet")
    pq.write_table(table.slice(0, 320), tmp_path / "data.parquet")
    arguments = [
        *("--ds_config", "ds_configs/zero2.json", "--config", "examples/emoji/t2i.yaml"),
        *("--config_override", "val_data_path=null", "eval_steps=0", "max_steps=9"),
        *("warmup_steps=2", "logging_steps=1", "batch_size=32", "save_steps=3", "num_workers=1"),
        *("gradient_self_test=false", f"data_path={tmp_path / 'data.parquet'}"),
    ]
    whole = launch(*arguments, f"output_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr[-3000:]

    command = train(*arguments, f"output_dir={tmp_path / 'killed'}")
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    started = time.monotonic()
    while not (tmp_path / "killed" / "latest").exists():
        assert running.poll() is None, "ended before its first checkpoint"
        assert time.monotonic() - started < 240
        time.sleep(0.05)
    subprocess.run(["pkill", "-KILL", "-f", f"local_rank=1.*{tmp_path / 'killed'}"], check=True)
    assert running.wait(timeout=90) != 0

    resumed = launch(*arguments, f"output_dir={tmp_path / 'killed'}", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
