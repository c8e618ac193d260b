"""Keeping what a live teacher gives during the first epoch, so that later ones need no teacher.

After the epoch, :func:`precompute` embeds what it did not meet: negatives that were not drawn, pairs
that filled no batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vembed_ds.data.vector_table import KeyArray, SegmentWriter, VectorTable
from vembed_ds.distributed import comm
from vembed_ds.similarity import Embeddings
from vembed_ds.teachers.cache import open_table


class FirstEpoch:
    """Adds the items of every step to a table. All methods are collective.

    Each rank writes what it has itself, and each content is written once: of a step, by the lowest
    rank that has it; what is there already stays as it is.

    Args:
        table: From :func:`ensure_cache`; the same segments on every rank.
    """

    def __init__(self, table: VectorTable) -> None:
        self._table = table
        self._writer = SegmentWriter(table.folder)
        self._seen: set[int] = set()  # by any rank, since the last commit

    def add(self, keys: KeyArray, items: Embeddings) -> None:
        """Keep the teacher's embeddings of this rank's items of a step.

        Args:
            keys: ``[n]``, from :meth:`Instructions.keys`; may repeat.
            items: n items, in the same order, on any device.

        Raises:
            VembedError: On every rank, when a value is not finite or it cannot be written.
        """
        gathered = comm.all_gather_objects(keys)
        own = np.flatnonzero(self._is_new(gathered))
        comm.run_together(
            lambda: self._writer.append(keys[own], items.rows(torch.from_numpy(own))),
            doing=f"writing {self._table.folder}",
        )
        for found in gathered:
            self._seen.update(found.tolist())

    def commit(self) -> VectorTable:
        """Make what was added a part of the table; a run that ends before loses it.

        To be called when a checkpoint is saved, and after the epoch. A resumed run then finds all
        of the steps that it does not repeat.

        Returns:
            The table, with it.

        Raises:
            VembedError: On every rank, when it cannot be written.
        """
        folder = self._table.folder
        comm.run_together(self._writer.finish, doing=f"writing {folder}")
        self._table, self._writer = open_table(folder), SegmentWriter(folder)
        self._seen.clear()
        return self._table

    def _is_new(self, gathered: list[KeyArray]) -> npt.NDArray[np.bool_]:
        """``[n]``: which of this rank's items are the first of their content in the whole run."""
        start = sum(map(len, gathered[: comm.rank()]))
        own = gathered[comm.rank()]
        _, firsts = np.unique(np.concatenate(gathered), return_index=True)
        first = np.isin(np.arange(start, start + len(own)), firsts)
        unseen = np.array([key not in self._seen for key in own.tolist()], dtype=bool)
        new: npt.NDArray[np.bool_] = first & unseen & ~self._table.has(own)
        return new
