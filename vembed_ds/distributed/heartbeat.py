"""Signs of life: who is dead or hangs is named, and no rank waits for it longer than allowed.

Every rank tells the store of the job once a second what it is doing. Rank 0 reads all ranks;
the others read rank 0 and its verdict, so that the store answers 3 questions per rank and
second however many ranks there are. Two threads do this. One talks to the store and may
be stuck there, when rank 0, which keeps it, is stopped. The other only looks at the clock, and ends
the process when a rank was silent for too long: with NCCL a hanging exchange raises no error.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from vembed_ds.distributed import phases
from vembed_ds.distributed.notices import Notices
from vembed_ds.distributed.phases import Kind, Status
from vembed_ds.distributed.places import place_of, place_of_main_thread
from vembed_ds.distributed.verdict import (
    Beat,
    Peer,
    Verdict,
    describe_doings,
    describe_error,
    describe_gone,
    describe_left,
    describe_silent,
    describe_stall,
    first_error,
    silent_peers,
)
from vembed_ds.errors import DistributedError, PeerError, one_line

INTERVAL = 1.0  # seconds
EXIT_PEER = 1  # starting again may help
EXIT_MEND = 2  # it does not: another rank found something that is to be mended first
_VERDICT = "verdict"
_GONE_SECONDS = 3.5  # so long silent: the rank whose connection has closed is gone
_EXPLAINING = 8.0  # seconds in which it must turn out who broke an exchange
_WAIT_FOR_RANK_0 = 6.0  # seconds of them in which the other ranks leave the judgement to rank 0
_LINGER = 3.0  # seconds that rank 0 keeps the store for the others' last questions
_OWN_END = 15.0  # seconds in which a rank ends by itself after another one's error
_NOBODY = Verdict("", EXIT_PEER)


class Heartbeat:
    """This rank's signs of life, and its watch over the others.

    Args:
        store: A connection to the store that nothing else uses.
        rank: Of this process.
        names: Every rank's host and process.
        limit: Seconds after which a silent rank ends the job.
        end_process: Ends this process with an exit code, whatever its main thread does.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        names: Sequence[str],
        limit: float,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._store, self._rank, self._limit = store, rank, limit
        self._names = [f"rank {number} ({name})" for number, name in enumerate(names)]
        self._end_process = end_process
        self._interval = min(INTERVAL, limit / 20)
        self._grace = min(_GONE_SECONDS, limit / 2)
        self._number = 0  # of beats
        self._last: Beat | None = None  # what is said instead of the current phase
        self._beats = [Beat() for _ in names]
        self._seen = [time.monotonic() for _ in names]  # when the beat was a new one
        self._reads_all, self._has_read_all = rank == 0, False
        # The others know rank 0 only; one of them tells when that one is silent.
        self._notices = Notices(rank=rank, limit=limit) if rank <= 1 else None
        self._verdict = _NOBODY  # rank 0's, as it is in the store
        self._published = _NOBODY  # what rank 0 puts there
        self._stop, self._wake, self._told = (threading.Event() for _ in range(3))
        self._ending = threading.Lock()  # who has it says why this process ends
        self._threads = [
            threading.Thread(target=target, name=f"heartbeat{target.__name__}", daemon=True)
            for target in (self._talk, self._watch)
        ]

    def start(self) -> None:
        """Begin. Every rank calls it."""
        for thread in self._threads:
            thread.start()
        # A thread that comes back to Python from the store in the middle of an exit would abort it.
        atexit.register(self._join)

    def explain(self, error: BaseException) -> DistributedError:
        """Who broke an exchange between the ranks; it may take some seconds to turn out.

        Args:
            error: What the exchange raised on this rank.

        Returns:
            An error that names the rank and what it was doing.
        """
        if not self._ending.acquire(blocking=False):
            time.sleep(_LINGER)  # the watch has said why, and is about to end this process
        self._last = _beat_of(error)
        self._reads_all = True
        self._wake.set()
        verdict = self._find_out(timed_out="timed out" in str(error).lower())
        if self._rank == 0:
            self._publish(verdict)
        return _as_error(
            verdict, doing=f"'{phases.status_of(error)}' ({one_line(error, length=110)})"
        )

    def _find_out(self, *, timed_out: bool) -> Verdict:
        started = time.monotonic()
        # After a timeout rank 0 has long seen who is silent; the others only have to say that they
        # wait as well.
        enough = 2 * self._interval if timed_out and self._rank == 0 else self._grace
        while (waited := time.monotonic() - started) < _EXPLAINING:
            time.sleep(self._interval / 4)
            if self._verdict.words:
                return self._verdict
            peers = self._peers()
            ended = first_error(peers)
            if ended is not None and (not ended.beat.by_peer or waited > _EXPLAINING / 2):
                return _verdict_of(ended)
            if self._rank != 0 and waited < _WAIT_FOR_RANK_0 and self._has_read_all:
                continue
            if gone := silent_peers(peers, limit=self._grace):
                words = (
                    describe_silent(gone, limit=self._limit) if timed_out else describe_gone(gone)
                )
                return Verdict(words, EXIT_PEER)
            if waited > enough and (left := describe_left(peers)):
                return Verdict(left, EXIT_PEER)
            if waited > enough and timed_out:
                return Verdict(describe_doings(peers, limit=self._limit), EXIT_PEER)
        return Verdict(
            "an exchange between the ranks broke, though all of them are alive: look at the network "
            "between their machines",
            EXIT_PEER,
        )

    def say_last_words(self, words: str, *, code: int, by_peer: bool) -> None:
        """Tell the other ranks by which error this one ends.

        Args:
            words: The error.
            code: The exit code of this process.
            by_peer: The cause is another rank.
        """
        self._ending.acquire(blocking=False)  # from here on this rank ends by itself
        self._say(Beat(words=words, code=code, by_peer=by_peer))

    @property
    def ends_by_peer(self) -> bool:
        """Whether this rank has said that it ends because of another one."""
        return self._last is not None and self._last.by_peer

    def leave(self) -> None:
        """Say goodbye and stop; rank 0 keeps the store until the others have too, or are gone."""
        self._ending.acquire(blocking=False)
        if self._last is None or not self._last.words:
            self._say(Beat(left=True))
        started = time.monotonic()
        while self._is_needed() and time.monotonic() - started < _LINGER:
            time.sleep(self._interval / 4)
        self._join()

    def _join(self) -> None:
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(1.0)  # the store may not answer any more

    def _say(self, last: Beat) -> None:
        self._last = last
        self._told.clear()
        self._wake.set()
        self._told.wait(2 * self._interval)

    def _is_needed(self) -> bool:
        """Whether the others may still ask rank 0's store."""
        return self._rank == 0 and any(
            rank != 0
            and not (peer.beat.left or peer.beat.words)
            and peer.silent_seconds < self._grace
            for rank, peer in self._peers().items()
        )

    def _peers(self) -> dict[int, Peer]:
        """The ranks as this one knows them: all, or only rank 0."""
        now = time.monotonic()
        return {
            rank: Peer(
                name, self._beats[rank], 0.0 if rank == self._rank else now - self._seen[rank]
            )
            for rank, name in enumerate(self._names)
            if rank == 0 or self._has_read_all
        }

    # The thread that talks to the store.

    def _talk(self) -> None:
        try:
            self._tell()
            keys = [*map(_key, range(len(self._names))), _VERDICT]
            self._store.wait(keys, timedelta(seconds=self._limit))
            while not self._stop.is_set():
                last = self._last
                self._tell()
                self._listen()
                if last is not None:
                    self._told.set()
                self._wake.wait(self._interval)
                self._wake.clear()
        except (DistError, RuntimeError):
            return  # the store is gone; what was heard last stands

    def _tell(self) -> None:
        self._number += 1
        beat = self._last or _beat_of_phase(phases.current(), place=place_of_main_thread())
        self._store.set(_key(self._rank), json.dumps(beat._replace(number=self._number)))
        if self._rank == 0:
            self._store.set(_VERDICT, json.dumps(self._published))

    def _listen(self) -> None:
        reads_all = self._reads_all
        ranks = range(len(self._names)) if reads_all else range(1)
        *beats, verdict = self._store.multi_get([*map(_key, ranks), _VERDICT])
        for rank, text in zip(ranks, beats, strict=True):
            beat = Beat(*json.loads(text))
            if beat.number != self._beats[rank].number:
                self._beats[rank], self._seen[rank] = beat, time.monotonic()
        self._has_read_all = reads_all
        self._verdict = Verdict(*json.loads(verdict))

    # The thread that watches the clock.

    def _watch(self) -> None:
        tick = self._interval / 2
        before = time.monotonic()
        while not self._stop.wait(tick):
            now = time.monotonic()
            if now - before > min(5.0, self._limit / 2):  # this process itself was stopped
                self._seen = [now for _ in self._seen]
            before = now
            if self._notices is not None and not self._ending.locked():
                self._notices.look(self._peers())
            verdict = self._judge()
            if verdict.words and self._ending.acquire(blocking=False):
                self._end(verdict)

    def _judge(self) -> Verdict:
        """Why the job must end; without words: it need not."""
        if self._verdict.words:
            return self._verdict
        peers = self._peers()
        if silent := silent_peers(peers, limit=self._limit):
            return Verdict(describe_silent(silent, limit=self._limit), EXIT_PEER)
        ended = first_error(peers)
        if ended is not None and ended.silent_seconds > _OWN_END:
            return _verdict_of(ended)
        if self._rank == 0 and (stall := describe_stall(peers, limit=self._limit)):
            return Verdict(stall, EXIT_PEER)
        return _NOBODY

    def _end(self, verdict: Verdict) -> None:
        if self._rank == 0:
            self._publish(verdict)
        doing = f"'{phases.current()}' (at {place_of_main_thread()})"
        error = _as_error(verdict, doing=doing)
        sys.stderr.write(f"vembed_ds: rank {self._rank}: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        self._say(Beat(words=verdict.words, code=verdict.code, by_peer=True))
        time.sleep(3 * self._interval)  # the launcher ends all when one exits: let all say it
        self._end_process(verdict.code)

    def _publish(self, verdict: Verdict) -> None:
        """Let the other ranks know. The store may be stuck, so it is not waited for."""
        self._published = verdict
        self._wake.set()


def is_exchange_error(error: BaseException) -> bool:
    """Whether an error, or its cause, came from an exchange between the ranks."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, DistError):
            return True
        if isinstance(found, RuntimeError) and any(
            word in str(found) for word in ("gloo/", "NCCL", "ProcessGroup")
        ):
            return True
        found = found.__cause__ or found.__context__
    return False


def _verdict_of(ended: Peer) -> Verdict:
    code = EXIT_MEND if ended.beat.code == EXIT_MEND else EXIT_PEER
    return Verdict(describe_error(ended), code)


def _as_error(verdict: Verdict, *, doing: str) -> DistributedError:
    kind = DistributedError if verdict.code == EXIT_MEND else PeerError
    return kind(f"{verdict.words}; this rank was in {doing}")


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _beat_of(error: BaseException) -> Beat:
    """What this rank was doing when an exchange failed; its phases have been left since."""
    return _beat_of_phase(phases.status_of(error), place=place_of(error))


def _beat_of_phase(status: Status, *, place: str) -> Beat:
    kind = status.phases[-1].kind if status.phases else Kind.OTHER
    seconds = time.monotonic() - status.since
    return Beat(doing=str(status), kind=kind, seconds=seconds, place=place)
