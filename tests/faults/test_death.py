"""F1: a rank that dies, or ends by an error of its own, is named by all others, and soon."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.conftest import ROOT
from tests.faults.processes import Ended, ranks
from tests.integration.launching import PROGRAMS, free_port, run_command

pytestmark = [pytest.mark.faults, pytest.mark.distributed(3)]

SECONDS = 15  # in which every rank ends after a death
START_SECONDS = 30  # three times torch is imported, on two cores
MANY, MINUTES = "100000", "5"
OWN = r"this rank was in 'step 3: waiting for the other ranks' \(.*gloo.*\)"


def ended(*, size: int, victim: int, fault: str) -> dict[int, Ended]:
    """How all ranks end when the fault happens to one of them, far below timeout_minutes."""
    command = ["-m", "tests.faults.ranks", MANY, MINUTES, str(victim), fault]
    with ranks(command, size=size) as running:
        running.wait([victim], seconds=START_SECONDS)
        others = [rank for rank in range(size) if rank != victim]
        found = running.wait(others, seconds=SECONDS)
    for rank in others:
        assert "Traceback" not in found[rank].stderr
        assert found[rank].stderr.startswith(f"vembed_ds: rank {rank}: "), found[rank].stderr
    return found


@pytest.mark.parametrize(
    ("size", "victim"),
    [
        pytest.param(3, 1, id="one of three"),
        pytest.param(2, 0, id="the one that keeps the store", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_is_named(size: int, victim: int) -> None:
    for found in ended(size=size, victim=victim, fault="kill").values():
        assert found.code == 1
        expected = (
            rf"PeerError: rank {victim} \(host \S+, pid \d+\) is gone: no sign of life for \d+ s, last "
            rf"seen in '[^']+'; if nobody ended it, look for the kernel's out-of-memory killer .*; {OWN}"
        )
        assert re.search(expected, found.stderr), found.stderr


def test_an_error_of_one_rank_is_told_by_all_with_its_exit_code() -> None:
    for found in ended(size=3, victim=1, fault="error").values():
        assert found.code == 2, "starting again does not help"
        expected = (
            r"DistributedError: rank 1 \(host \S+, pid \d+\) ended: DataError: data.jsonl, record 7: "
            rf"not a record; {OWN}"
        )
        assert re.search(expected, found.stderr), found.stderr


@pytest.mark.slow
def test_an_unexpected_error_of_rank_0_is_told_by_the_others() -> None:
    (found,) = ended(size=2, victim=0, fault="bug").values()
    assert found.code == 1
    expected = r"PeerError: rank 0 \(.*\) ended: IndexError: list index out of range; "
    assert re.search(expected, found.stderr), found.stderr


@pytest.mark.slow
def test_a_rank_that_is_done_before_the_others_is_named() -> None:
    (found,) = ended(size=2, victim=1, fault="finish").values()
    assert found.code == 1
    assert re.search(r"PeerError: rank 1 \(.*\) finished while this rank still", found.stderr)


@pytest.mark.distributed(2)
def test_a_training_whose_rank_is_killed_in_the_third_chunk_ends_and_names_it(
    make_config: Callable[..., str], tmp_path: Path
) -> None:
    config = make_config(gradient_cache_chunk_size=1, gradient_self_test=False, save_steps=1)
    arguments = ["--config", config, "--ds_config", str(ROOT / "ds_configs" / "zero3.json")]
    command = ["-m", "tests.faults.trainer", "kill", "1", "2", "3", *arguments]
    with ranks(command, size=2) as running:
        running.wait([1], seconds=90)
        found = running.wait([0], seconds=SECONDS)[0]
    assert found.code == 1
    own = [line for line in found.stderr.splitlines() if line.startswith("vembed_ds: ")]
    assert len(own) == 1
    expected = (
        r"vembed_ds: rank 0: PeerError: rank 1 \(host \S+, pid \d+\) is gone: no sign of life for \d+ s, "
        r"last seen in '.*'; .*; this rank was in 'step 2: .*' \(.*gloo.*\)"
    )
    assert re.match(expected, own[0]), found.stderr
    assert "Traceback" not in found.stderr
    assert (tmp_path / "out" / "latest").read_text().strip() == "checkpoint-step-1"


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_under_the_launcher_the_survivor_says_who_died_before_it_is_ended(
    make_config: Callable[..., str],
) -> None:
    config = make_config(gradient_cache_chunk_size=1, gradient_self_test=False)
    done = run_command(
        [
            *(str(PROGRAMS / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())),
            *("--module", "tests.faults.trainer", "kill", "1", "2", "3"),
            *("--config", config, "--ds_config", str(ROOT / "ds_configs" / "zero2.json")),
        ],
        seconds=240,
    )
    assert done.returncode != 0
    assert "vembed_ds: rank 0: PeerError: rank 1 (host" in done.stderr
    assert "Traceback" not in done.stderr
