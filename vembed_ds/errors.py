"""Errors a user can meet; every message names the place, the value, the rule and the remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence


def one_line(error: BaseException, *, length: int = 300) -> str:
    """What another library's error says, as a part of one of our sentences; cut behind a word."""
    text = " ".join(str(error).split())
    if len(text) > length:
        start = text[: length - 3]
        text = f"{start.rpartition(' ')[0] or start}..."
    return text or type(error).__name__


def counted(number: int, what: str) -> str:
    """Such as ``"1 rank"`` and ``"2 ranks"``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def refused_global(error: BaseException) -> str | None:
    """What a pickle would have called, as PyTorch's restricted loader names it in its error."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found and found[1]


class VembedError(Exception):
    """Base of the errors that commands print without a traceback."""


class ConfigError(VembedError):
    """One or more problems found in the configuration, reported together.

    Args:
        problems: One sentence each, in the form
            ``key=value (origin): rule; remedy``. A single string is one problem.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        """Keep the list of problems when the error travels between processes."""
        return (type(self), (self.problems,))


class DataError(VembedError):
    """A data file, record or image that cannot be used; names file and record."""


class WorkerError(DataError):
    """A loader process that died or gives no answer, so that a restart may help."""


class CheckpointError(VembedError):
    """A checkpoint that is missing, incomplete or does not fit."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written; the same on every rank, and training is untouched."""


class StorageError(SaveError):
    """The device or file server failed in a way that may pass, so that a restart may help."""


class GradientError(VembedError):
    """The gradient self-test found that chunking changes the gradient."""


class DivergedError(VembedError):
    """The loss is no longer a number; going on would only spoil the weights further."""


class DistributedError(VembedError):
    """Another rank failed, or the ranks disagree; names rank and cause."""


class PeerError(DistributedError):
    """Another rank died, hangs or never came, so that a restart may help."""


class ReplicaError(DistributedError):
    """Ranks hold different copies of what must be the same; the last checkpoint was compared."""


class StoppedError(VembedError):
    """A signal stopped the run, which can go on from its checkpoint; no failure."""


class OutOfMemoryError(VembedError):
    """The host or the accelerator has no memory for some work; names it and what makes it smaller."""
