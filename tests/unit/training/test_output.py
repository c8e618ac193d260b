"""What a fresh run moves away of an earlier one in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_ds.config.loading import parse_config
from vembed_ds.training.output import _set_aside, prepare_output

OLD = [
    ".checkpoint-step-3.partial/file",
    "best",
    "checkpoint-step-1/file",
    "config.yaml",
    "ds_config.json",
    "guide-0123/file",
    "latest",
    "metrics.csv",
    "metrics.jsonl",
    "mlflow.db",
    "mlflow_run_id.txt",
    "nonfinite-step-2.json",
    "skipped_records.txt",
    "spike-step-1.json",
    "swanlab/run/file",
    "swanlab_run_id.txt",
    "tensorboard/events",
    "wandb/run/file",
    "wandb_run_id.txt",
]
KEPT = ["data.jsonl", "frozen_features/text-0123/file", "run.lock", "teacher_cache/0123/file"]


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def used(tmp_path: Path) -> Path:
    for name in (*OLD, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_all_that_a_run_wrote_moves(used: Path) -> None:
    _set_aside(used)
    assert files(used / "previous-1") == OLD
    assert files(used) == sorted([*KEPT, *(f"previous-1/{name}" for name in OLD)])


def test_what_was_converted_into_the_folder_moves_too(
    used: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Not: what this run needs, models deeper down, and a conversion that still writes.
    converted = ["model/vembed_config.json", "model/model.safetensors", "small/vembed_config.json"]
    kept = [
        "start/vembed_config.json",
        "start/text_encoder/config.json",
        "other/mine/vembed_config.json",
    ]
    kept.append(".new.partial-host-1/vembed_config.json")
    for name in (*converted, *kept):
        (used / name).parent.mkdir(parents=True, exist_ok=True)
        (used / name).touch()
    (used / "data.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    config = parse_config(
        {
            "text_model_name": str(used / "start" / "text_encoder"),
            "image_model_name": "some/model",
            "data_path": str(used / "data.jsonl"),
            "output_dir": str(used),
        }
    )
    prepare_output(config, {}, resuming=True)
    assert not (used / "previous-1").exists()
    prepare_output(config, {}, resuming=False)
    assert files(used / "previous-1") == sorted([*OLD, *converted])
    assert {*KEPT, *kept} < set(files(used))
    assert (
        f"{used} held an earlier run; it was moved to {used}/previous-1, with what was converted "
        "into the folder (model, small)"
    ) in caplog.text


@pytest.mark.parametrize("moved", ["ds_config.json", "checkpoint-step-1", "spike-step-1.json"])
def test_what_a_crash_left_of_it_moves_at_the_next_start(
    used: Path, monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    rename = Path.rename

    def crash(self: Path, target: Path) -> Path:
        if (used / "previous-1" / moved).exists():
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            _set_aside(used)
    _set_aside(used)
    assert sorted(files(used / "previous-1") + files(used / "previous-2")) == OLD
