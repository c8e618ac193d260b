"""What the user of the command chose, and what a workload gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Row = dict[str, Any]

CODE = {
    "gradcache": "folder of luyug/GradCache",
    "vembed_factory": "folder of vembed-factory",
    "open_clip_loss": "file src/open_clip/loss.py of open_clip",
}
"""Peers that are on no package index, by the option that says where their code is."""


@dataclass(frozen=True)
class Options:
    """Of one run of the command.

    Attributes:
        scratch: A folder that is removed afterwards.
        rounds: How often every variant is timed, in a world of its own each time.
        steps: Timed steps of a world, after one that warms up.
        quick: Sizes that take seconds, to see that everything runs; the figures mean nothing.
        peers: Whose variants are wanted; empty: everybody's.
        code: Paths by the names in :data:`CODE`, as far as given.
    """

    scratch: Path
    rounds: int = 2
    steps: int = 3
    quick: bool = False
    peers: frozenset[str] = frozenset()
    code: Mapping[str, Path] = field(default_factory=dict)

    def within(self, folder: str) -> Options:
        """The same in a folder of its own."""
        return replace(self, scratch=self.scratch / folder)


@dataclass
class Result:
    """Of one workload.

    Attributes:
        columns: Of the table, by title: the key in a row and how its value is written.
        rows: One of each variant; what was not measured is not in it.
        notes: Lines below the table.
        raw: Everything measured, for the JSON.
    """

    columns: Mapping[str, tuple[str, str]]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    raw: Any = None


@dataclass(frozen=True)
class Workload:
    """A comparison that the command can be asked for.

    Attributes:
        title: What is compared.
        run: Compares it.
        plotted: Keys of the rows: what the plot shows across, and upwards; empty: no plot.
    """

    title: str
    run: Callable[[Options], Result]
    plotted: tuple[str, ...] = ()
