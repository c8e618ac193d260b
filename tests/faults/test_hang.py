"""F2: a rank that does not answer, or does not come, ends the job within timeout_minutes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from tests.distributed.conftest import ROOT
from tests.faults.processes import Ended, ranks

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]

MINUTES = 0.1
LIMIT_SECONDS = 60 * MINUTES
# How long it takes to find out who hangs, and for rank 0 to keep the store for the others, does
# not grow with the limit: 2 to 5 s, and more on a busy machine.
AT_MOST_SECONDS = LIMIT_SECONDS + 14
START_SECONDS = 30


def ended(*, size: int, victim: int, fault: str) -> dict[int, Ended]:
    """How the other ranks end when one hangs, timed from about then."""
    command = ["-m", "tests.faults.ranks", "100000", str(MINUTES), str(victim), fault]
    with ranks(command, size=size) as running:
        running.wait_for("step 3", rank=victim, seconds=START_SECONDS)
        started = time.monotonic()
        others = [rank for rank in range(size) if rank != victim]
        found = running.wait(others, seconds=AT_MOST_SECONDS)
        assert time.monotonic() - started > LIMIT_SECONDS - 1, "before the limit"
        if fault == "sleep":  # it hears of the verdict and ends as well
            found |= running.wait([victim], seconds=AT_MOST_SECONDS)
        else:
            assert running.processes[victim].poll() is None
    for rank in found:
        assert found[rank].code == 1
        assert "Traceback" not in found[rank].stderr
        before, _, words = found[rank].stderr.partition("vembed_ds: ")
        # One rank had told the log before; the limit is so short that it did so after 3 s.
        told = rank == 0 or (rank == 1 and victim == 0)
        assert (f"rank {victim} (host " in before) == told, found[rank].stderr
        assert before.count("\n") == int(told)
        assert words.startswith(f"rank {rank}: PeerError: ")
        assert "(limit: timeout_minutes=0.1)" in found[rank].stderr
        doing = "data" if rank == victim else "the other ranks"
        assert f"this rank was in 'step 3: waiting for {doing}'" in found[rank].stderr
    return found


@pytest.mark.parametrize(
    ("size", "victim", "fault"),
    [
        pytest.param(3, 1, "stop", id="one of three is stopped"),
        pytest.param(
            2, 0, "stop", id="the one that keeps the store is stopped", marks=pytest.mark.slow
        ),
        pytest.param(
            2, 1, "hold Python's lock", id="one holds Python's lock", marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_that_gives_no_sign_of_life_is_named(size: int, victim: int, fault: str) -> None:
    expected = (
        rf"rank {victim} \(host \S+, pid \d+\) gave no sign of life for \d+ s, last seen in '[^']+' "
        r"\(limit: .*\): stopped, cut off from the network, or hanging"
    )
    for found in ended(size=size, victim=victim, fault=fault).values():
        assert re.search(expected, found.stderr), found.stderr


def test_a_rank_that_lives_and_does_not_come_is_named_with_what_it_does() -> None:
    expected = (
        r"rank 1 \(host \S+, pid \d+\) is alive, and for \d+ s in 'step 3: waiting for data' "
        r"\(at tests/faults/ranks.py:\d+\); the others wait: rank 0 in 'step 3: waiting for the "
        r"other ranks' for \d+ s \(at torch/distributed/.*\)"
    )
    for found in ended(size=2, victim=1, fault="sleep").values():
        assert re.search(expected, found.stderr), found.stderr


@pytest.mark.slow
def test_a_training_with_a_stopped_rank_ends_and_names_it(
    make_config: Callable[..., str],
) -> None:
    minutes = 0.5
    config = make_config(
        gradient_cache_chunk_size=1, gradient_self_test=False, timeout_minutes=minutes
    )
    arguments = ["--config", config, "--ds_config", str(ROOT / "ds_configs" / "zero3.json")]
    command = ["-m", "tests.faults.trainer", "stop", "1", "2", "3", *arguments]
    with ranks(command, size=2) as running:
        running.wait_for("step 2: embedding", rank=1, seconds=180)
        found = running.wait([0], seconds=1.2 * 60 * minutes)[0]
    assert found.code == 1
    expected = (
        r"vembed_ds: rank 0: PeerError: rank 1 \(.*\) gave no sign of life for \d\d s, last seen in "
        r"'step [12]: .*' \(limit: timeout_minutes=0.5\): stopped, .*; this rank was in 'step 2: .*'"
    )
    assert re.search(expected, found.stderr), found.stderr
    assert "Traceback" not in found.stderr
