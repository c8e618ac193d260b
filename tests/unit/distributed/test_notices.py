"""Ranks that are silent or do not come are named long before the job ends."""

from __future__ import annotations

import time

import pytest

from tests.unit.distributed.test_verdict import peer
from vembed_ds.distributed.notices import Notices, notice
from vembed_ds.distributed.phases import Kind
from vembed_ds.distributed.verdict import Peer

LIMIT = 1800.0
LOADS = peer(1, "start: loading the model", Kind.LOADING)


def test_a_rank_that_others_wait_for_is_named() -> None:
    kind, words = notice({0: peer(0), 1: LOADS}, limit=LIMIT)
    assert kind == "awaited"
    assert words.startswith(
        "still waiting: rank 1 (host a, pid 101) is alive, and for 61 s in 'start: loading the model'"
    )
    assert "the others wait: rank 0 in 'step 12: waiting for the other ranks' for 61 s" in words
    assert words.endswith("(limit: timeout_minutes=30)")


def test_a_silent_rank_is_named() -> None:
    kind, words = notice({0: peer(0), 1: peer(1, silent=60)}, limit=LIMIT)
    assert kind == "silent"
    assert words.startswith("rank 1 (host a, pid 101) gave no sign of life for 60 s, last seen in")


def test_ranks_that_hang_in_work_are_named_after_five_minutes() -> None:
    def both(seconds: float) -> dict[int, Peer]:
        chunks = enumerate(("step 3: embedding chunk 2", "step 3: embedding chunk 3"))
        return {n: peer(n, chunk, Kind.EMBEDDING, seconds=seconds) for n, chunk in chunks}

    assert notice(both(299), limit=LIMIT) == ("", "")  # large chunks may take so long
    kind, words = notice(both(300), limit=LIMIT)
    assert kind == "stalled"
    assert words.startswith(
        "nobody goes on: the ranks do not meet: rank 0 in 'step 3: embedding ch"
    )


@pytest.mark.parametrize(
    "peers",
    [
        pytest.param({0: peer(0, seconds=59), 1: LOADS}, id="not for long"),
        pytest.param({0: peer(0), 1: peer(1)}, id="one long exchange"),
        pytest.param({0: peer(0, "loading", Kind.LOADING), 1: LOADS}, id="nobody waits"),
        pytest.param({0: peer(0), 1: peer(1, words="DataError: x")}, id="one has ended"),
        pytest.param({0: peer(0), 1: peer(1, "done", Kind.OTHER, left=True)}, id="one is done"),
        pytest.param({0: peer(0, silent=59)}, id="a rank that knows rank 0 only"),
    ],
)
def test_no_false_alarm(peers: dict[int, Peer]) -> None:
    assert notice(peers, limit=LIMIT) == ("", "")


def test_a_short_limit_is_halved() -> None:
    assert notice({0: peer(0, seconds=10), 1: LOADS}, limit=20.0)[0] == "awaited"
    assert notice({0: peer(0, seconds=9), 1: LOADS}, limit=20.0)[0] == ""


def test_every_stall_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    notices = Notices(rank=0, limit=LIMIT)
    stalls = {0: peer(0), 1: LOADS}, {0: peer(0, seconds=1), 1: LOADS}
    for peers in (stalls[0], stalls[0], stalls[1], stalls[0], {0: peer(0), 1: peer(1, silent=60)}):
        notices.look(peers)
        time.sleep(0.05)  # another thread writes it
    assert [record.getMessage()[:13] for record in caplog.records] == [
        *("still waiting", "still waiting"),
        "rank 1 (host ",
    ]
