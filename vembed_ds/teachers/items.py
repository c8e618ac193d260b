"""The items of data sets, each content once, as a frozen model reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from vembed_ds.data.dataset import NEGATIVE, PairDataset, Sample
from vembed_ds.data.processors import ItemProcessor, content_key
from vembed_ds.data.records import Item, content_number
from vembed_ds.data.sampler import SampleKey, own_share
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.data.vector_table import KeyArray
from vembed_ds.distributed import comm
from vembed_ds.errors import ConfigError, VembedError

ROLES = ("query", "positive", NEGATIVE)
ITEMS = "items"  # the one role of what is loaded here


def read_instruction(
    wanted: str | None, settings: Mapping[str, Any], role: str, *, key: str
) -> str:
    """What a frozen model reads before the texts of a role.

    Args:
        wanted: As configured; ``None``: what its folder states.
        settings: Content of the folder's ``vembed_config.json``; empty for a plain folder.
        role: ``query`` or ``document``.
        key: The configuration's key, for messages.

    Raises:
        ConfigError: It was trained on several, of which none is chosen.
    """
    if wanted is not None:
        return wanted
    stated = settings.get(f"{role}_instruction", "")
    if stated is None:
        raise ConfigError(
            f"{key}: the {key.split('_')[0]} was trained on data sets with instructions of "
            "their own; say which it shall read"
        )
    return str(stated)


@dataclass(frozen=True)
class DistinctItems:
    """Every content once.

    Attributes:
        keys: ``[N]``, ascending.
        addresses: ``[N, 4]`` int64: data set, record, role, place in the role; of the first item
            that holds this content.
    """

    keys: KeyArray
    addresses: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """N."""
        return len(self.keys)

    def where(self, wanted: npt.NDArray[np.bool_]) -> DistinctItems:
        """Some of them, by ``[N]``."""
        return DistinctItems(self.keys[wanted], self.addresses[wanted])


def distinct_items(members: Sequence[PairDataset], instructions: Instructions) -> DistinctItems:
    """Read all records, without decoding them. Collective: the ranks share the records.

    Contents are told apart by 64-bit hashes (of an image file: of its bytes). Two of 10^8 contents
    have the same one with probability 3e-4.

    Raises:
        DataError: On every rank, when a record or an image file cannot be read.
    """

    def keys_of(role: str, items: Sequence[Item]) -> KeyArray:
        numbers = [content_number(content_key(i, read_files=True).encode()) for i in items]
        return instructions.keys(role, numbers)

    return distinct_contents(members, lambda item: True, keys_of)


def distinct_contents(
    members: Sequence[PairDataset],
    wanted: Callable[[Item], bool],
    keys_of: Callable[[str, Sequence[Item]], KeyArray],
) -> DistinctItems:
    """As :func:`distinct_items`, of some items, and with keys of one's own. Collective.

    Args:
        members: The data sets.
        wanted: Which items count.
        keys_of: From a role and n of its items to their keys, ``[n]``.

    Raises:
        DataError: As of :func:`distinct_items`, or raised by ``keys_of``.
    """
    found = comm.run_together(
        lambda: _merged([_read(members, wanted, keys_of)]), doing="reading the records"
    )
    return _merged(comm.all_gather_objects(found))


class ItemDataset(Dataset[Sample | VembedError]):
    """Encodes the items at some addresses; every sample has the one role ``ITEMS``.

    Args:
        members: The data sets.
        addresses: Of :class:`DistinctItems`.
        processor: Of the frozen model.
        instructions: Of the frozen model.
    """

    def __init__(
        self,
        members: Sequence[PairDataset],
        addresses: npt.NDArray[np.int64],
        *,
        processor: ItemProcessor,
        instructions: Instructions,
    ) -> None:
        self._members, self._addresses = list(members), addresses
        self._processor, self._instructions = processor, instructions

    def __len__(self) -> int:
        """Number of items."""
        return len(self._addresses)

    def as_read(self, item: Item, *, role: str) -> Item:
        """What the model reads of an item."""
        return replace(item, instruction=self._instructions.of(role))

    def __getitem__(self, key: SampleKey | int) -> Sample | VembedError:
        """One item; an error is returned, as in :class:`PairDataset`."""
        index = key.index if isinstance(key, SampleKey) else key
        member, number, role, place = (int(value) for value in self._addresses[index])
        dataset, name = self._members[member], ROLES[role]
        try:
            encoded = self._processor.encode(
                self.as_read(dataset.record(number).items[name][place], role=name),
                origin=f"{dataset.reader.origin}, record {number}, {name}",
                augment_seed=None,
            )
        except VembedError as error:
            return error
        return Sample(index, roles={ITEMS: [encoded]}, keys={ITEMS: []})


def _read(
    members: Sequence[PairDataset],
    wanted: Callable[[Item], bool],
    keys_of: Callable[[str, Sequence[Item]], KeyArray],
) -> DistinctItems:
    """The items of this rank's share of the records; contents may repeat."""
    keys: list[KeyArray] = []
    addresses: list[tuple[int, int, int, int]] = []
    for member, dataset in enumerate(members):
        for number in own_share(len(dataset), rank=comm.rank(), world_size=comm.world_size()):
            for role, items in enumerate(dataset.record(number).items.values()):
                places = [place for place, item in enumerate(items) if wanted(item)]
                keys.append(keys_of(ROLES[role], [items[place] for place in places]))
                addresses += [(member, number, role, place) for place in places]
    return DistinctItems(
        np.concatenate(keys) if keys else np.empty(0, np.int64),
        np.array(addresses, dtype=np.int64).reshape(-1, 4),
    )


def _merged(parts: Sequence[DistinctItems]) -> DistinctItems:
    keys, first = np.unique(np.concatenate([part.keys for part in parts]), return_index=True)
    return DistinctItems(keys, np.concatenate([part.addresses for part in parts])[first])
