"""Who is dead or hangs, from what the ranks last said."""

from __future__ import annotations

import re

import pytest

from vembed_ds.distributed.phases import Kind
from vembed_ds.distributed.verdict import (
    Beat,
    Peer,
    describe_doings,
    describe_error,
    describe_gone,
    describe_left,
    describe_silent,
    describe_stall,
    first_error,
    silent_peers,
)

WAITS = "step 12: waiting for the other ranks"


def peer(
    rank: int,
    doing: str = WAITS,
    kind: Kind = Kind.WAITING,
    *,
    seconds: float = 61,
    silent: float = 0.4,
    **said: object,
) -> Peer:
    beat = Beat(doing=doing, kind=kind, seconds=seconds, place=f"file.py:{len(doing)}", **said)  # type: ignore[arg-type]
    return Peer(f"rank {rank} (host a, pid {100 + rank})", beat, silent)


def test_a_rank_that_does_not_come_is_named_with_what_it_does() -> None:
    peers = {rank: peer(rank) for rank in range(6)}
    peers[1] = peer(1, "step 12: waiting for data", Kind.DATA, seconds=63)
    expected = (
        "rank 1 (host a, pid 101) is alive, and for 63 s in 'step 12: waiting for data' "
        "(at file.py:25); the others wait: ranks 0, 2-5 in 'step 12: waiting for the other ranks' "
        "for 61 s (at file.py:36) (limit: timeout_minutes=1)"
    )
    assert describe_stall(peers, limit=60) == expected


@pytest.mark.parametrize(
    "peers",
    [
        pytest.param({0: peer(0), 1: peer(1, "loading", Kind.LOADING, seconds=59)}, id="goes on"),
        pytest.param({0: peer(0), 1: peer(1)}, id="all do the same"),
        pytest.param(
            {0: peer(0, "building", Kind.OTHER), 1: peer(1, "loading", Kind.LOADING)},
            id="nobody waits",
        ),
        pytest.param({0: peer(0), 1: peer(1, words="DataError: x")}, id="one has ended"),
        pytest.param({0: peer(0), 1: peer(1, left=True)}, id="one is done"),
    ],
)
def test_no_stall(peers: dict[int, Peer]) -> None:
    assert describe_stall(peers, limit=60) is None


def test_ranks_that_wait_in_different_exchanges_do_not_meet() -> None:
    peers = {0: peer(0), 1: peer(1, "step 13: reducing the gradient", Kind.REDUCTION)}
    found = describe_doings(peers, limit=60)
    assert found.startswith(
        "the ranks do not meet: rank 0 in 'step 12: waiting for the other ranks'"
    )
    assert "rank 1 in 'step 13: reducing the gradient'" in found


def test_silent_ranks_are_those_that_said_no_goodbye() -> None:
    peers = {
        0: peer(0),
        1: peer(1, silent=60),
        2: peer(2, silent=99, left=True),
        3: peer(3, silent=99, words="DataError: x"),
    }
    silent = silent_peers(peers, limit=60)
    assert silent == [peers[1]]
    assert re.match(
        r"rank 1 \(host a, pid 101\) gave no sign of life for 60 s, last seen in 'step 12: waiting "
        r"for the other ranks' \(limit: timeout_minutes=1\): stopped",
        describe_silent(silent, limit=60),
    )
    assert "rank 1 (host a, pid 101) is gone: no sign of life for 60 s" in describe_gone(silent)


def test_of_many_silent_ranks_a_few_are_described() -> None:
    found = describe_gone([peer(rank, silent=60) for rank in range(1, 64)])
    assert found.count("pid") == 4
    assert "so are 59 more" in found


def test_the_first_error_is_of_a_rank_that_did_not_end_because_of_another() -> None:
    peers = {
        0: peer(0, words="PeerError: rank 2 ended", by_peer=True),
        1: peer(1),
        2: peer(2, words="CheckpointError: x", code=2),
    }
    found = first_error(peers)
    assert found == peers[2]
    assert describe_error(peers[2]) == "rank 2 (host a, pid 102) ended: CheckpointError: x"
    assert first_error({0: peer(0)}) is None


def test_a_rank_that_finished_early_is_named() -> None:
    found = describe_left({0: peer(0), 1: peer(1, left=True)})
    assert found is not None
    assert found.startswith("rank 1 (host a, pid 101) finished while")
    assert describe_left({0: peer(0), 1: peer(1)}) is None
