"""The commands of the README through the real launcher; few, because each starts a world."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.integration.launching import PROGRAMS, ROOT, free_port, run_command

SHORT = ["max_steps=2", "logging_steps=1", "warmup_steps=1", "val_data_path=null", "eval_steps=0"]
RUN_SECONDS = 280
# Two launchers and two ranks import torch first: 14 s on two cores of which others have a share.
ERROR_SECONDS = 60

pytestmark = [pytest.mark.slow, pytest.mark.distributed(2)]


def train(*arguments: str) -> list[str]:
    """The command on 2 ranks, at a port that is free."""
    world = ["--num_gpus", "2", "--master_port", str(free_port())]
    return [str(PROGRAMS / "deepspeed"), *world, "--module", "vembed_ds.train", *arguments]


def launch(*arguments: str, seconds: float = RUN_SECONDS) -> subprocess.CompletedProcess[str]:
    return run_command(train(*arguments), seconds=seconds)


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
        assert f"step 1 of 2: loss {lines[0]['train/loss']:.5g}, " in done.stderr
    assert len(set(first)) == 1, first


def errors_of_ranks(*overrides: str) -> list[str]:
    """What the 2 ranks of a run say that must end soon, by itself and as a failure."""
    done = launch(
        *("--ds_config", "ds_configs/zero2.json", "--config", "examples/emoji/t2i.yaml"),
        # In several flags: none of them may win over another.
        *(word for override in overrides for word in ("--config_override", override)),
        seconds=ERROR_SECONDS,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    # The second line of a message is indented; the launcher's own lines begin with a bracket.
    found = re.findall(r"^vembed_ds: (rank \d: .*(?:\n  .*)*)", done.stderr, re.MULTILINE)
    assert len(found) == 2, done.stderr[-3000:]
    return sorted(found)


LATE = """
import os, time
if os.environ.get("RANK") == "1":
    time.sleep(3)
"""


def test_mistakes_end_every_rank_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The launcher kills the other ranks within a second of the first exit; a rank that started
    # later, as on a busy machine, must still have said what is wrong.
    (tmp_path / "sitecustomize.py").write_text(LATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    errors = errors_of_ranks("graident_cache=true", "lr=fast", f"output_dir={tmp_path}")
    message = (
        "ConfigError: "
        "graident_cache=True (--config_override): unknown key; did you mean use_gradient_cache?\n"
        "  lr='fast' (--config_override): expected a number > 0"
    )
    assert errors == [f"rank 0: {message}", f"rank 1: {message}"]


def test_what_one_rank_finds_ends_every_rank(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    lines = [json.dumps({"name": f"text {i}", "image": f"{i}.png"}) for i in range(2)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    errors = errors_of_ranks(
        f"data_path={tmp_path / 'data.jsonl'}",
        f"image_root={tmp_path}",
        f"output_dir={tmp_path / 'out'}",
        "val_data_path=null",
        "eval_steps=0",
        "image_augmentation=[]",
    )
    sentence = (
        f"record 1, positive: image {tmp_path / '1.png'} does not exist; "
        "correct the path, or image_root where one is set"
    )
    assert errors == [
        f"rank 0: DistributedError: rank 1 failed: {sentence}",
        f"rank 1: DataError: {sentence}",
    ]


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
