"""Whose disk a run's folder lies on: all ranks' together, or every machine's own."""

from __future__ import annotations

from dataclasses import dataclass

from vembed_ds.distributed import comm


@dataclass(frozen=True)
class Disk:
    """The ranks that see the same folder as this one.

    Attributes:
        name: The same on these ranks only.
        index: Of this rank among them.
        size: How many they are.
    """

    name: int
    index: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this rank alone does what must be done once on the disk."""
        return self.index == 0


def this_disk(*, node_local: bool) -> Disk:
    """The disk that this rank writes to.

    Args:
        node_local: Every machine has a folder of its own under the one name.
    """
    if not node_local:
        return Disk(0, comm.rank(), comm.world_size())
    # Launchers number the ranks of a machine one after the other.
    return Disk(comm.rank() - comm.local_rank(), comm.local_rank(), comm.local_world_size())
