"""The watch over the other ranks, when no exchange fails: the process is ended by a thread.

Here both ranks live in one process, and what ends a process is replaced.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from queue import Empty, Queue

import pytest
import torch.distributed as dist  # noqa: TID251 (a store without ranks)

from vembed_ds.distributed import heartbeat
from vembed_ds.distributed.heartbeat import Heartbeat, is_exchange_error
from vembed_ds.distributed.phases import Kind, phase

LIMIT = 1.0


class Ranks:
    """Two heartbeats that share a store, and the codes by which they would end."""

    def __init__(self) -> None:
        self.codes: list[Queue[int]] = [Queue(), Queue()]
        store = dist.HashStore()
        self.hearts = [
            Heartbeat(
                store,
                rank=rank,
                names=["host a, pid 1", "host a, pid 2"],
                limit=LIMIT,
                end_process=self.codes[rank].put,
            )
            for rank in range(2)
        ]
        for heart in self.hearts:
            heart.start()

    def code(self, rank: int, *, seconds: float) -> int | None:
        """By which the rank ends; ``None``: it does not."""
        try:
            return self.codes[rank].get(timeout=seconds)
        except Empty:
            return None


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    for heart in made.hearts:
        heart._join()


def silence(heart: Heartbeat) -> None:
    """As a stopped process is: neither a beat nor a look at the others."""
    heart._join()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_rank_ends_the_other(
    ranks: Ranks, victim: int, capsys: pytest.CaptureFixture[str]
) -> None:
    silence(ranks.hearts[victim])
    assert ranks.code(1 - victim, seconds=3 * LIMIT) == 1
    message = capsys.readouterr().err
    assert message.startswith(
        f"vembed_ds: rank {1 - victim}: PeerError: rank {victim} (host a, pid {victim + 1}) gave no "
        "sign of life for 1 s, last seen in 'start"
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_rank_is_named_in_the_log_before_that(
    ranks: Ranks, victim: int, caplog: pytest.LogCaptureFixture
) -> None:
    silence(ranks.hearts[victim])
    assert ranks.code(1 - victim, seconds=3 * LIMIT) == 1
    # On a machine that is busy enough, others may seem to be silent for a moment, too.
    assert ("WARNING" if victim else "ERROR") in {  # what a rank shows
        record.levelname
        for record in caplog.records
        if record.getMessage().startswith(f"rank {victim} (host a, pid {victim + 1}) gave no sign")
    }


def test_nobody_ends_while_all_give_signs_of_life(ranks: Ranks) -> None:
    time.sleep(2 * LIMIT)
    assert ranks.code(0, seconds=0.1) is None
    assert ranks.code(1, seconds=0.1) is None


def test_a_rank_that_said_goodbye_may_be_silent(ranks: Ranks) -> None:
    ranks.hearts[1].leave()
    assert ranks.code(0, seconds=2 * LIMIT) is None


def test_the_error_of_another_rank_ends_one_that_does_not_end_by_itself(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "_OWN_END", 0.2)
    ranks.hearts[1].say_last_words("DataError: x", code=2, by_peer=False)
    ranks.hearts[1].leave()
    assert ranks.code(0, seconds=3 * LIMIT) == 2
    assert "DistributedError: rank 1 (host a, pid 2) ended: DataError: x" in capsys.readouterr().err


def test_a_process_that_was_stopped_itself_accuses_nobody(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.monotonic
    ahead = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead)
    ahead = 1000.0
    assert ranks.code(0, seconds=0.8 * LIMIT) is None


def test_who_ends_an_exchange_that_only_timed_out_is_the_one_who_does_not_come(
    ranks: Ranks,
) -> None:
    # This rank's error; the other one, in the same process, still "loads".
    def exchange() -> None:
        with phase(Kind.WAITING):
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Timed out waiting 60000ms")

    with pytest.raises(RuntimeError) as caught:
        exchange()
    assert is_exchange_error(caught.value)
    with phase(Kind.LOADING, "loading the model"):
        found = str(ranks.hearts[0].explain(caught.value))
    assert found.startswith(
        "rank 1 (host a, pid 2) is alive, and for 0 s in 'start: loading the model'"
    )
    assert "the others wait: rank 0 in 'start: waiting for the other ranks'" in found
    assert found.endswith(
        "this rank was in 'start: waiting for the other ranks' ([gloo/transport/tcp/pair.cc] Timed out "
        "waiting 60000ms)"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"), True),
        (dist.DistBackendError("x"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo/ is no folder"), False),
    ],
)
def test_what_an_exchange_raises(error: Exception, expected: bool) -> None:
    assert is_exchange_error(error) is expected
