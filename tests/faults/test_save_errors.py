"""Whole runs whose checkpoints or metrics cannot be written (F10)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import verify
from tests.distributed.test_train import ds_file, metrics_of
from tests.worlds import World

CASES = "tests.faults.save_cases:"
CHANGES = {"save_steps": 1, "eval_on_start": False, "val_data_path": None}

# Room for three checkpoints of 9 MB, and what else a run writes.
ROOM = pytest.mark.parametrize("small_disk", ["40m"], indirect=True)

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]


@ROOM
@pytest.mark.parametrize(
    ("room_at", "save_async", "saved"),
    [
        ((3, 1), False, [1, 3, 4]),
        ((4, 2), False, [1, 4]),  # the last step, at the second try
        ((4, 2), True, [1, 4]),
    ],
)
def test_a_full_disk_costs_checkpoints_and_not_the_run(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    small_disk: Path,
    room_at: tuple[int, int],
    save_async: bool,
    saved: list[int],
) -> None:
    out = small_disk / "out"
    config = make_config(
        output_dir=str(out), on_save_error="warn", save_async=save_async, **CHANGES
    )
    results = world(2).run(
        f"{CASES}run_on_full_disk", config=config, ds_config=ds_file(2), room_at=room_at
    )
    for result in results:
        assert "error" not in result, result["error"]
        assert result["code"] == 0
    names = sorted(path.name for path in out.glob("*checkpoint*"))
    assert names == [f"checkpoint-step-{step}" for step in saved]
    assert (out / "latest").read_text() == names[-1]
    for name in names:
        verify(out / name)
    lines = [line for line in metrics_of(out) if "padding" not in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


@ROOM
@pytest.mark.parametrize("save_async", [False, True])
def test_the_last_step_must_be_saved(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    small_disk: Path,
    save_async: bool,
) -> None:
    out = small_disk / "out"
    config = make_config(
        output_dir=str(out), on_save_error="warn", save_async=save_async, **CHANGES
    )
    results = world(2).run(
        f"{CASES}run_on_full_disk", config=config, ds_config=ds_file(2), room_at=None
    )
    for result in results:
        assert result["error"] == results[0]["error"]
        assert result["code"] == 2
        assert result["error"].startswith(
            "SaveError: the last step is done, and could not be saved, also not at a second try: "
            "checkpoint-step-4 was not saved: rank "
        )
        assert "no space left on device" in result["error"]
        assert "then start again with --resume auto" in result["error"]
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-step-1"]
    verify(out / "checkpoint-step-1")


def test_metrics_that_cannot_be_written_end_every_rank(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    config = make_config(**CHANGES)
    first, second = world(2).run(f"{CASES}run_without_metrics", config=config, ds_config=ds_file(2))
    file = tmp_path / "out" / "metrics.jsonl"
    cause = f"{file}: cannot be written ([Errno 28] No space left on device); free space or choose"
    assert first["error"].startswith(f"VembedError: {cause}")
    assert second["error"].startswith(f"DistributedError: rank 0 failed: {cause}")
    assert first["code"] == second["code"] == 2
    verify(tmp_path / "out" / "checkpoint-step-3")  # they end before the next step
