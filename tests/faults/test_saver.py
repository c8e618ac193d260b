"""Which checkpoints stay, what a failed one does, and saving in the background."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import verify
from tests.worlds import World
from vembed_ds.checkpointing.manifest import reading
from vembed_ds.checkpointing.names import best_checkpoint, leftovers
from vembed_ds.checkpointing.rotation import rotate
from vembed_ds.checkpointing.saver import Best, resume_best
from vembed_ds.checkpointing.store import find_checkpoint
from vembed_ds.errors import CheckpointError

CASES = "tests.faults.checkpoint_cases:"

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_the_newest_and_the_best_stay(world: Callable[[int], World], tmp_path: Path) -> None:
    out = tmp_path / "out"
    judged = world(2).run(
        f"{CASES}evaluated",
        out=str(out),
        values=[0.1, 0.5, 0.5, float("nan"), 0.4],
        total_limit=2,
        best_metric="recall@10",
    )
    assert judged == [[True, True, False, False, False]] * 2
    assert names(out) == [
        "best",
        *(f"checkpoint-step-{step}" for step in (2, 4, 5)),
        "latest",
    ]
    assert best_checkpoint(out) == out / "checkpoint-step-2"
    for folder in out.glob("checkpoint-step-*"):
        verify(folder)
    state = json.loads((out / "checkpoint-step-5" / "trainer_state.json").read_text())
    assert state["best"] == {"metric": "recall@10", "value": 0.5, "step": 2}
    assert find_checkpoint("auto", out) == out / "checkpoint-step-5"


@pytest.fixture(scope="module")
def four(world: Callable[[int], World], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints, of which the second is the best."""
    out = tmp_path_factory.mktemp("four")
    world(2).run(
        f"{CASES}evaluated", out=str(out), values=[0.1, 0.5, 0.2, 0.4], best_metric="recall@10"
    )
    return out


@pytest.fixture
def out(four: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(four, tmp_path / "out"))


def test_without_a_limit_all_stay(out: Path) -> None:
    assert len(list(out.glob("checkpoint-step-*"))) == 4


def test_what_is_being_read_is_not_deleted(out: Path) -> None:
    with reading(out / "checkpoint-step-1"):
        assert rotate(out, total_limit=1) == [out / "checkpoint-step-3"]
    assert (out / "checkpoint-step-1").is_dir()
    assert rotate(out, total_limit=1) == [out / "checkpoint-step-1"]
    assert names(out) == ["best", "checkpoint-step-2", "checkpoint-step-4", "latest"]


def test_what_latest_names_and_what_nobody_knows_is_not_deleted(out: Path) -> None:
    (out / "latest").write_text("checkpoint-step-1")
    (out / "checkpoint-step-3" / "manifest.json").unlink()
    assert rotate(out, total_limit=1) == []
    assert len(list(out.glob("checkpoint-step-*"))) == 4


def test_a_crash_while_deleting_leaves_no_half_checkpoint(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path) -> None:
        (path / "latest").unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("vembed_ds.checkpointing.rotation.shutil.rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        rotate(out, total_limit=1)
    assert [path.name for path, *_ in leftovers(out)] == [".checkpoint-step-3.deleted"]
    for folder in out.glob("checkpoint-step-*"):
        verify(folder)


def test_a_resumed_run_knows_the_best_so_far(
    out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    best = Best("recall@10", 0.5, 2)
    assert resume_best(out / "checkpoint-step-4", out, metric="recall@10") == best
    assert resume_best(out / "checkpoint-step-4", out, metric="mrr") is None
    assert resume_best(out / "checkpoint-step-4", out, metric=None) is None
    assert resume_best(None, out, metric="recall@10") is None
    # From before the second step: what `best` named then.
    assert resume_best(out / "checkpoint-step-1", out, metric="recall@10") == Best(
        "recall@10", 0.1, 1
    )
    assert best_checkpoint(out) == out / "checkpoint-step-1"
    assert not caplog.records
    assert resume_best(out / "checkpoint-step-4", tmp_path / "new", metric="recall@10") is None
    assert (
        f"{out}/checkpoint-step-2: the best checkpoint so far (recall@10=0.5) is another run's and "
        f"not in {tmp_path / 'new'}; the next evaluation counts as the best"
    ) in caplog.text
    caplog.clear()
    shutil.rmtree(out / "checkpoint-step-2")
    assert resume_best(out / "checkpoint-step-4", out, metric="recall@10") is None
    assert (
        f"{out}/checkpoint-step-2: the best checkpoint so far (recall@10=0.5) is not there"
        in caplog.text
    )
    (out / "best").unlink()
    with pytest.raises(CheckpointError, match="best: missing; train with best_metric"):
        best_checkpoint(out)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_saving_in_the_background_saves_the_same(
    world: Callable[[int], World], tmp_path: Path, stage: int
) -> None:
    threads = world(2).run(f"{CASES}save_both_ways", out=str(tmp_path), stage=stage)
    assert all(name.startswith("checkpoint") for found in threads for name in found)
    now, later = (tmp_path / way / "checkpoint-step-2" for way in ("now", "later"))
    assert verify(now).files.keys() == verify(later).files.keys()
    compared = [path for path in now.glob("*.pt") if "random" not in path.name]
    assert len(compared) == {0: 1, 1: 3, 3: 4}[stage]
    tensors = 0
    for path in compared:
        first, second = (
            torch.load(folder / path.name, weights_only=False) for folder in (now, later)
        )
        tensors += count_equal(first, second)
    assert tensors >= 12
    assert (tmp_path / "later" / "latest").read_text() == "checkpoint-step-2"


def count_equal(first: Any, second: Any) -> int:
    """Compare contents of whatever kind; the number of tensors."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
        return 1
    if isinstance(first, dict):
        assert list(first) == list(second)
        return sum(count_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        return sum(map(count_equal, first, second))
    if hasattr(first, "__dict__") and "deepspeed" in type(first).__module__:
        return count_equal(vars(first), vars(second))
    assert first == second
    return 0


@pytest.mark.parametrize("on_error", ["fail", "warn"])
def test_an_error_in_the_background_is_everybodys_at_the_next_save(
    world: Callable[[int], World], tmp_path: Path, on_error: str
) -> None:
    out = tmp_path / "out"
    answers = world(2).run(f"{CASES}fail_in_background", out=str(out), on_error=on_error)
    assert answers[0] == answers[1]
    assert not leftovers(out)
    if on_error == "fail":
        (error,) = answers[0]["errors"]
        assert "at 3: checkpoint-step-2 was not saved: rank 1: " in error
        assert "no space left on device" in error
        assert names(out) == ["best", "checkpoint-step-1", "latest"]
        assert answers[0]["best"] == Best("mrr", 0.1, 1)
    else:
        assert answers[0]["errors"] == []
        assert names(out) == ["best", "checkpoint-step-1", "checkpoint-step-3", "latest"]
        assert answers[0]["best"] == Best("mrr", 0.3, 3)
    for folder in out.glob("checkpoint-step-*"):
        verify(folder)
