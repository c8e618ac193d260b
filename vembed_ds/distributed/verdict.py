"""From what the ranks last said of themselves to a sentence about who is dead or hangs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vembed_ds.distributed.phases import Kind

# Innermost phases in which a rank may be waiting for the others; in the first it does nothing else.
WAITING = frozenset({Kind.WAITING, Kind.REDUCTION})
_MEETING = WAITING | {Kind.EMBEDDING, Kind.REPLAY, Kind.OPTIMIZER, Kind.SAVING, Kind.TEACHER}
_NAMED = 4  # ranks that a message describes; it counts the others
_HINT = "if nobody ended it, look for the kernel's out-of-memory killer (dmesg) on its machine"


class Beat(NamedTuple):
    """What a rank says of itself, every second.

    Attributes:
        number: Grows with every beat.
        doing: Its phases, in words.
        kind: The innermost phase's.
        seconds: For how long it has been in it.
        place: Where in the code, for example ``"vembed_ds/data/loader.py:77"``.
        words: How it ended, if it did so by an error.
        code: With which exit code.
        by_peer: It ended because another rank did.
        left: It is done.
    """

    number: int = 0
    doing: str = ""
    kind: str = Kind.OTHER
    seconds: float = 0.0
    place: str = ""
    words: str = ""
    code: int = 0
    by_peer: bool = False
    left: bool = False


class Peer(NamedTuple):
    """A rank as another one sees it.

    Attributes:
        name: Such as ``"rank 1 (host a, pid 12)"``.
        beat: Its last.
        silent_seconds: For how long no new one came.
    """

    name: str
    beat: Beat
    silent_seconds: float


class Verdict(NamedTuple):
    """Why a job ends.

    Attributes:
        words: The sentence; empty: it does not end.
        code: Exit code of the process that says so.
    """

    words: str
    code: int


Peers = Mapping[int, Peer]


def first_error(peers: Peers) -> Peer | None:
    """The rank that ended by an error of its own, if one did; else one that ended because of it."""
    ended = [peer for peer in peers.values() if peer.beat.words]
    return min(ended, key=lambda peer: peer.beat.by_peer, default=None)


def describe_error(peer: Peer) -> str:
    """Of a rank that ended by an error."""
    return f"{peer.name} ended: {peer.beat.words}"


def silent_peers(peers: Peers, *, limit: float) -> list[Peer]:
    """The ranks that neither said goodbye nor gave a sign of life for ``limit`` seconds."""
    return [
        peer
        for peer in peers.values()
        if peer.silent_seconds >= limit and not peer.beat.words and not peer.beat.left
    ]


def describe_silent(silent: Sequence[Peer], *, limit: float) -> str:
    """Of ranks that did not end and do not answer: they are stopped, unreachable, or hang."""
    return (
        f"{_each(silent, 'gave no sign of life')} (limit: timeout_minutes={limit / 60:g}): stopped, "
        "cut off from the network, or hanging in code that never gives Python's lock back; "
        f"{_HINT}"
    )


def describe_gone(gone: Sequence[Peer]) -> str:
    """Of ranks whose connection closed and that are silent since."""
    return f"{_each(gone, 'is gone: no sign of life')}; {_HINT}"


def describe_left(peers: Peers) -> str | None:
    """Of ranks that are done while others are not; ``None``: there are none."""
    left = [peer for peer in peers.values() if peer.beat.left]
    if not left or len(left) == len(peers):
        return None
    return (
        f"{_names(left)} finished while this rank still expected an exchange: the ranks do not agree "
        "on how much there is to do; every rank must see the same files and configuration"
    )


def describe_stall(peers: Peers, *, limit: float) -> str | None:
    """Of ranks that all live and of which none goes on, because one does not come.

    Args:
        peers: All ranks, this one included.
        limit: Seconds for which every rank must have been in its phase.

    Returns:
        ``None`` when one goes on, when none waits for another, or when all do the same.
    """
    beats = [peer.beat for peer in peers.values()]
    if any(beat.left or beat.words or beat.seconds < limit for beat in beats):
        return None
    if not any(beat.kind in _MEETING for beat in beats):
        return None
    if len({beat.doing for beat in beats}) == 1:
        return None
    return describe_doings(peers, limit=limit)


def describe_doings(peers: Peers, *, limit: float) -> str:
    """Who is where, those first who do not wait for others."""
    setting = f"(limit: timeout_minutes={limit / 60:g})"
    waiting = {rank: peer for rank, peer in peers.items() if peer.beat.kind in WAITING}
    awaited = [peer for rank, peer in peers.items() if rank not in waiting]
    if not waiting or not awaited:
        return f"the ranks do not meet: {_groups(peers)} {setting}"
    described = [
        f"{peer.name} is alive, and for {peer.beat.seconds:.0f} s in '{peer.beat.doing}' "
        f"(at {peer.beat.place})"
        for peer in awaited[:_NAMED]
    ]
    return f"{'; '.join(described)}{_more(awaited)}; the others wait: {_groups(waiting)} {setting}"


def _groups(peers: Peers) -> str:
    """Ranks that do the same, together."""
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, peer in sorted(peers.items()):
        groups.setdefault((peer.beat.doing, peer.beat.place), []).append(rank)
    shown = [
        f"{_numbers(ranks)} in '{doing}' for {peers[ranks[0]].beat.seconds:.0f} s (at {place})"
        for (doing, place), ranks in groups.items()
    ]
    return ", ".join(shown[:_NAMED]) + (", ..." if len(shown) > _NAMED else "")


def _numbers(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(words)


def _each(peers: Sequence[Peer], what: str) -> str:
    found = [
        f"{peer.name} {what} for {peer.silent_seconds:.0f} s, last seen in '{peer.beat.doing}'"
        for peer in peers[:_NAMED]
    ]
    return "; ".join(found) + _more(peers)


def _more(peers: Sequence[Peer]) -> str:
    return f"; so are {len(peers) - _NAMED} more" if len(peers) > _NAMED else ""


def _names(peers: Sequence[Peer]) -> str:
    return ", ".join(peer.name for peer in peers[:_NAMED]) + _more(peers)
