"""Which step of a training loop is on the disk, and when the next one is due by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from vembed_ds.checkpointing.names import step_of
from vembed_ds.errors import SaveError

_RETRY_AFTER = 0.1  # of the minutes between checkpoints, when the last one could not be written


class Saves:
    """The checkpoints of a loop, whose writing may fail without ending the run.

    Args:
        write: Writes a checkpoint after a step, and gives the newest that is on the disk, if any is: a
            write may go on in the background, or have failed; collective.
        finish: Waits for what is still being written; gives the newest checkpoint of this run, if it
            has any yet; collective.
        failure: Why the last checkpoint was not written, where that did not end the run; local.
        minutes: Between checkpoints; ``None``: not by time.
        newest: The newest checkpoint of this run when the loop begins.
    """

    def __init__(
        self,
        *,
        write: Callable[[int], Path | None],
        finish: Callable[[], Path | None],
        failure: Callable[[], SaveError | None],
        minutes: float | None,
        newest: Path | None,
    ) -> None:
        self._write, self._finish, self._failure = write, finish, failure
        self._minutes, self.newest = minutes, newest
        self._tried_at = time.monotonic()

    def write(self, step: int) -> None:
        """Write a checkpoint after a step, or begin to. Collective."""
        self.newest = self._write(step) or self.newest
        self._tried_at = time.monotonic()

    def has(self, step: int) -> bool:
        """Whether the newest checkpoint is that of ``step``; waits for a write. Collective."""
        self.newest = self._finish() or self.newest
        return self.newest is not None and step_of(self.newest.name) == step

    def is_late(self) -> bool:
        """Whether one is due, by this rank's clock; sooner when the last could not be written."""
        if self._minutes is None:
            return False
        part = 1.0 if self._failure() is None else _RETRY_AFTER
        return time.monotonic() - self._tried_at >= 60 * self._minutes * part

    def require(self, step: int) -> None:
        """See that the last step is saved: without it the run is not complete. Collective.

        Raises:
            SaveError: On every rank, whatever on_save_error says.
        """
        if self.has(step):
            return
        error = self._failure() or SaveError("nothing was written")
        raise type(error)(
            f"the last step is done, and could not be saved, also not at a second try: {error}; then "
            "start again with --resume auto, which does the steps behind the newest checkpoint again"
        )

    def place_to_go_on(self, step: int, *, how: str = "start again with --resume auto") -> str:
        """Where a run that stopped after ``step`` goes on from, in words. Collective.

        Args:
            step: Optimizer steps done.
            how: What a user does to go on.
        """
        if self.has(step):
            return f"at step {step}, checkpoint {self.newest}: to go on, {how}"
        # It could not be written, and on_save_error is "warn".
        if self.newest is None:
            return f"at step {step}, which is not saved: start again"
        return f"at step {step}, which could not be saved: to go on from {self.newest}, {how}"
