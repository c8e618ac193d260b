"""What a fresh run moves away of an earlier one in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_ds.training.output import _set_aside

OLD = [
    ".checkpoint-step-3.partial/file",
    "best",
    "checkpoint-step-1/file",
    "config.yaml",
    "ds_config.json",
    "guide-0123/file",
    "latest",
    "metrics.jsonl",
    "nonfinite-step-2.json",
    "skipped_records.txt",
    "spike-step-1.json",
    "tensorboard/events",
    "wandb/run/file",
    "wandb_run_id.txt",
]
KEPT = ["data.jsonl", "run.lock", "teacher_cache/0123/file"]


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
