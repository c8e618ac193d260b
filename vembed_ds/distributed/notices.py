"""A word about ranks that are silent or do not come, long before they end the job."""

from __future__ import annotations

import logging
import threading

from vembed_ds.distributed.verdict import (
    WAITING,
    Peers,
    describe_doings,
    describe_silent,
    describe_stall,
    silent_peers,
)

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 60.0
# Where an exchange may be hidden in work, a chunk that is only long looks the same.
STALL_SECONDS = 300.0


class Notices:
    """Warns once per stall, in the log.

    Args:
        rank: Of this process.
        limit: Seconds after which the job ends.
    """

    def __init__(self, *, rank: int, limit: float) -> None:
        self._limit, self._said = limit, ""
        self._level = logging.ERROR if rank else logging.WARNING  # all that others than rank 0 show

    def look(self, peers: Peers) -> None:
        """Warn if there is reason to, and none was given yet."""
        kind, words = notice(peers, limit=self._limit)
        if kind and kind != self._said:
            # Whoever waits for the log's lock, or for a full pipe, is not the thread that watches.
            arguments = (self._level, "%s", words)
            threading.Thread(target=logger.log, args=arguments, daemon=True).start()
        self._said = kind


def notice(peers: Peers, *, limit: float) -> tuple[str, str]:
    """What is worth a warning.

    Args:
        peers: The ranks that this one knows, itself included where it knows all.
        limit: Seconds after which the job ends.

    Returns:
        What kind of stall it is, and the sentence; both empty when all goes on.
    """
    seconds = min(NOTICE_SECONDS, limit / 2)
    if silent := silent_peers(peers, limit=seconds):
        return "silent", describe_silent(silent, limit=limit)
    if _is_awaited(peers, seconds=seconds):
        return "awaited", f"still waiting: {describe_doings(peers, limit=limit)}"
    if describe_stall(peers, limit=min(STALL_SECONDS, limit / 2)):
        return "stalled", f"nobody goes on: {describe_doings(peers, limit=limit)}"
    return "", ""


def _is_awaited(peers: Peers, *, seconds: float) -> bool:
    """Whether a rank has waited in an exchange for so long, and another one is elsewhere."""
    beats = [peer.beat for peer in peers.values()]
    if any(beat.words or beat.left for beat in beats):
        return False
    waiting = [beat for beat in beats if beat.kind in WAITING]
    return len(waiting) < len(beats) and any(beat.seconds >= seconds for beat in waiting)
