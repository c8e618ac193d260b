"""F4 and F5: signals on any rank, at any moment; the resumed run is the uninterrupted one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import verify
from tests.distributed.conftest import tiny_config
from tests.distributed.test_train import ds_file, losses_of, metrics_of, run
from tests.faults.checkpoints_alike import require_same_checkpoints
from tests.worlds import World
from vembed_ds.errors import (
    ConfigError,
    DivergedError,
    PeerError,
    ReplicaError,
    StoppedError,
    VembedError,
    WorkerError,
)

CHANGES = {"save_steps": 2, "eval_steps": 2, "eval_on_start": False}
STOPPED = "tests.faults.stop_cases:run_stopped"

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]


@pytest.mark.parametrize(
    ("moment", "call", "rank", "signals", "step", "saves"),
    [
        # In the second step, which is finished; the evaluation behind it is left.
        ("step", 2, 1, ["SIGTERM"], 2, 1),
        ("step", 3, 0, ["SIGUSR1", "SIGTERM", "SIGINT"], 3, 2),
        ("evaluation", 2, 1, ["SIGINT", "SIGINT"], 2, 1),
        ("evaluation", 10, 0, ["SIGTERM"], 4, 2),  # behind the last step
        ("save", 1, 0, ["SIGTERM", "SIGTERM"], 2, 1),  # is finished, and not repeated
        ("wait", 1, 1, ["SIGTERM"], 1, 1),
    ],
)
@pytest.mark.one_in(2)
def test_a_stopped_run_goes_on_bitwise(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    tmp_path: Path,
    whole: Path,
    moment: str,
    call: int,
    rank: int,
    signals: list[str],
    step: int,
    saves: int,
) -> None:
    config = make_config(**CHANGES)
    results = world(2).run(
        STOPPED,
        config=config,
        ds_config=ds_file(2),
        moment=moment,
        call=call,
        rank=rank,
        signals=signals,
    )
    checkpoint = tmp_path / "out" / f"checkpoint-step-{step}"
    for result in results:
        assert result["error"] == (
            f"StoppedError: stopped by {signals[0]} on rank {rank} at step {step}, checkpoint "
            f"{checkpoint}: to go on, start again with --resume auto"
        )
        assert result["codes"] == [75]
        assert result["saves"] == saves
        assert result["put back"]
    assert (tmp_path / "out" / "latest").read_text() == checkpoint.name
    run(world(2), config, 2, resume="auto")
    assert losses_of(tmp_path / "out") == losses_of(whole)
    assert evaluations_of(tmp_path / "out") == evaluations_of(whole)
    require_same_checkpoints(tmp_path / "out" / "checkpoint-step-4", whole / "checkpoint-step-4")


@pytest.mark.parametrize(
    ("moment", "rank", "step", "saves"),
    [
        ("save", 0, 2, 1),  # while it is copied; it is written before the end
        ("write", 1, 3, 2),  # while it is written, and the step behind it is computed
    ],
)
@pytest.mark.one_in(2)
def test_saving_in_the_background_too(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    tmp_path: Path,
    whole: Path,
    moment: str,
    rank: int,
    step: int,
    saves: int,
) -> None:
    config = make_config(**CHANGES, save_async=True)
    stop = {"moment": moment, "rank": rank, "signals": ["SIGTERM", "SIGTERM"]}
    results = world(2).run(STOPPED, config=config, ds_config=ds_file(2), **stop)
    check_stopped(results, tmp_path / "out", rank=rank, step=step, saves=saves)
    if moment == "write":
        verify(tmp_path / "out" / "checkpoint-step-2")
    check_resumed(world(2), config, tmp_path / "out", whole)


@pytest.mark.parametrize("save_async", [False, True])
@pytest.mark.one_in(2)
def test_what_could_not_be_saved_is_saved_at_the_stop(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    tmp_path: Path,
    whole: Path,
    save_async: bool,
) -> None:
    config = make_config(**CHANGES, save_async=save_async, on_save_error="warn")
    stop = {"moment": "save", "rank": 0, "signals": ["SIGTERM"], "failing": 1}
    results = world(2).run(STOPPED, config=config, ds_config=ds_file(2), **stop)
    check_stopped(results, tmp_path / "out", rank=0, step=2, saves=2)
    check_resumed(world(2), config, tmp_path / "out", whole)


def check_stopped(
    results: list[dict[str, Any]], out: Path, *, rank: int, step: int, saves: int
) -> None:
    """Stopped by SIGTERM to ``rank``, behind a step that is saved."""
    for result in results:
        assert result["error"] == (
            f"StoppedError: stopped by SIGTERM on rank {rank} at step {step}, checkpoint "
            f"{out / f'checkpoint-step-{step}'}: to go on, start again with --resume auto"
        )
        assert result["saves"] == saves
    verify(out / f"checkpoint-step-{step}")


def check_resumed(world: World, config: str, out: Path, whole: Path) -> None:
    """The resumed run is the uninterrupted one."""
    run(world, config, 2, resume="auto")
    assert losses_of(out) == losses_of(whole)
    assert evaluations_of(out) == evaluations_of(whole)
    require_same_checkpoints(out / "checkpoint-step-4", whole / "checkpoint-step-4")


def test_an_evaluation_that_was_left_is_made_once(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    config, out = make_config(**CHANGES), tmp_path / "out"
    stop = {"moment": "evaluation", "call": 10, "rank": 0, "signals": ["SIGTERM"]}
    world(2).run(STOPPED, config=config, ds_config=ds_file(2), **stop)
    shutil.copytree(out, tmp_path / "copy")
    assert all(result["metrics"] for result in run(world(2), config, 2, resume="auto"))
    lines = metrics_of(out)
    assert [line["step"] for line in lines if "eval/mrr" in line] == [2, 4]
    # From here on the run is complete.
    assert run(world(2), config, 2, resume="auto") == [{"metrics": {}}] * 2
    assert metrics_of(out) == lines
    # So is one that has nothing to evaluate any more.
    changes = {"val_data_path": None, "eval_steps": None, "output_dir": str(tmp_path / "copy")}
    config = make_config(**{**CHANGES, **changes})
    assert run(world(2), config, 2, resume="auto") == [{"metrics": {}}] * 2


def evaluations_of(folder: Path) -> dict[int, dict[str, float]]:
    return {int(line["step"]): line for line in metrics_of(folder) if "eval/mrr" in line}


@pytest.fixture(scope="module")
def whole(
    world: Callable[[int], World],
    tmp_path_factory: pytest.TempPathFactory,
    clip_folder: Path,
    pairs: Path,
) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config(folder, model=clip_folder, pairs=pairs, **CHANGES)
    run(world(2), config, 2)
    return folder / "out"


def test_before_the_first_step_there_is_nothing_to_save(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    results = world(2).run(
        STOPPED,
        config=make_config(),
        ds_config=ds_file(2),
        moment="evaluation",
        rank=0,
        signals=["SIGTERM"],
    )
    for result in results:
        assert result["codes"] == [75]
        assert result["error"] == (
            "StoppedError: stopped by SIGTERM on rank 0 before the first step, so that there is "
            "nothing to save: start again"
        )
    assert not list((tmp_path / "out").glob("*checkpoint*"))


def test_saving_by_time_counts_from_the_last_checkpoint(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    config = make_config(save_every_minutes=1e-6, max_steps=3, val_data_path=None)
    run(world(2), config, 2)
    # Rank 0's clock decides for both; the last step is saved as always, once.
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-step-*"))
    assert names == [f"checkpoint-step-{step}" for step in (1, 2, 3)]
    config = make_config(save_every_minutes=60, max_steps=3, val_data_path=None)
    run(world(2), config, 2)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-step-*")] == [
        "checkpoint-step-3"
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x=1"), 2),
        (VembedError("writing x: no space left"), 2),
        (DivergedError("step 2"), 2),
        (PeerError("rank 1 died"), 1),
        (WorkerError("loader process 1 of 2 was killed"), 1),
        (ReplicaError("step 2"), 1),
        (StoppedError("stopped"), 75),
    ],
)
def test_another_ranks_error_has_the_code_of_ones_own(
    world: Callable[[int], World], error: VembedError, code: int
) -> None:
    case = "tests.faults.stop_cases:exit_code_of_another_rank"
    assert world(2).run(case, error=error, rank=1) == [code, code]
