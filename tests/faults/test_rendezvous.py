"""F36: the port is taken, or a rank never comes."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.faults.processes import Ranks, ranks

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]

MINUTES = 0.1
SECONDS = 60  # to import torch, wait and end

COMMAND = ["-m", "tests.faults.ranks", "3", str(MINUTES)]


def one_line(running: Ranks, rank: int) -> tuple[int, str]:
    """Exit code and message of a rank that ends by itself."""
    found = running.wait([rank], seconds=SECONDS)[rank]
    assert found.stderr.count("\n") == 1, found.stderr
    return found.code, found.stderr


@pytest.fixture(scope="module")
def starts() -> Iterator[dict[str, Ranks]]:
    """Three jobs that cannot start, all at once: what takes long is to import torch."""
    with (
        socket.socket() as other,
        ExitStack() as jobs,
    ):
        other.bind(("0.0.0.0", 0))
        other.listen(5)  # somebody else's port, who never answers
        yield {
            "taken": jobs.enter_context(ranks(COMMAND, size=2, port=other.getsockname()[1])),
            "incomplete": jobs.enter_context(ranks(COMMAND, size=4, started=[0, 2])),
            "without rank 0": jobs.enter_context(ranks(COMMAND, size=2, started=[1])),
        }


def test_a_taken_port_is_named_with_the_remedy(starts: dict[str, Ranks]) -> None:
    running = starts["taken"]
    code, message = one_line(running, 0)
    assert code == 2
    assert re.match(
        rf"vembed_ds: rank 0: DistributedError: MASTER_PORT={running.port}: taken by another process "
        r"on \S+, .*; choose a free port by --master_port",
        message,
    )
    code, message = one_line(running, 1)
    assert code == 1
    assert re.match(
        rf"vembed_ds: rank 1: PeerError: rank 0 was not found at 127.0.0.1:{running.port} "
        r"\(MASTER_ADDR, MASTER_PORT\) within 6 s: what listens there is no rank 0; look for",
        message,
    )


def test_ranks_that_never_come_are_named(starts: dict[str, Ranks]) -> None:
    running = starts["incomplete"]
    for rank in (0, 2):
        code, message = one_line(running, rank)
        assert code == 1
        assert re.match(
            rf"vembed_ds: rank {rank}: PeerError: 2 of 4 ranks came to 127.0.0.1:{running.port} "
            r"within 6 s \(timeout_minutes\); missing: 1, 3\. Look for",
            message,
        )


def test_a_rank_0_that_never_comes_is_named(starts: dict[str, Ranks]) -> None:
    running = starts["without rank 0"]
    code, message = one_line(running, 1)
    assert code == 1
    expected = rf"PeerError: rank 0 was not found at 127.0.0.1:{running.port} .*Connection refused"
    assert re.search(expected, message)


@pytest.mark.slow
def test_two_jobs_on_one_port_stay_apart() -> None:
    forever = ["-m", "tests.faults.ranks", "100000", "5"]
    with ranks(forever, size=2) as running:
        running.wait_for("step 3", rank=0, seconds=SECONDS)
        with (
            ranks(COMMAND, size=2, port=running.port, started=[1]) as other,
            ranks(COMMAND, size=3, port=running.port, started=[2]) as third,
        ):
            code, message = one_line(other, 1)
            assert code == 2
            assert "belongs to another job (it has a rank 1 already" in message
            code, message = one_line(third, 2)
            assert code == 2
            assert (
                "belongs to another job (it has 2 ranks already, this one has 3 ranks)" in message
            )
        assert all(process.poll() is None for process in running.processes.values())
