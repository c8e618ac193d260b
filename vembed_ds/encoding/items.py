"""The items of any table: which of its columns they are, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import datasets
from torch.utils.data import Dataset

from vembed_ds.data.cells import checked_image, checked_text, is_absent, only_value
from vembed_ds.data.columns import IMAGE, TEXT, Part, listed
from vembed_ds.data.dataset import Sample
from vembed_ds.data.image_paths import resolve_image_path
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import Item
from vembed_ds.data.sampler import SampleKey
from vembed_ds.errors import ConfigError, DataError, VembedError
from vembed_ds.streams import JOINT

Role = Literal["query", "document"]

ROLES: tuple[Role, ...] = ("query", "document")
AUTO = "auto"
ITEMS = "items"  # the one role of the samples made here
ID = "id"
COLUMN_KEYS = (TEXT, IMAGE, ID)
ID_NAMES = ("id", "_id", "__key__")
# In order of preference; the same names that training reads, and those of retrieval benchmarks.
_NAMES: dict[Role, dict[Part, tuple[str, ...]]] = {
    "query": {TEXT: ("query", "caption"), IMAGE: ("query_image",)},
    "document": {
        TEXT: ("positive", "document", "passage"),
        IMAGE: ("positive_image", "image"),
    },
}
_NEUTRAL: dict[Part, tuple[str, ...]] = {TEXT: ("text",), IMAGE: ()}


@dataclass(frozen=True)
class ItemColumns:
    """What is read of a table.

    Attributes:
        parts: Column of the texts, of the images, or both.
        id: Column that names the rows; ``None``: there is none.
        role: ``query`` or ``document``; ``None``: the columns do not say.
    """

    parts: dict[Part, str]
    id: str | None
    role: Role | None

    @property
    def names(self) -> list[str]:
        """The columns, each once."""
        found = [*self.parts.values(), *([] if self.id is None else [self.id])]
        return list(dict.fromkeys(found))


def choose_columns(
    columns: Sequence[str],
    *,
    role: str,
    given: Mapping[str, str],
    origin: str,
    flag: str = "--columns",
) -> ItemColumns:
    """Which columns hold the items.

    Args:
        columns: Of the table.
        role: ``query``, ``document``, or ``auto``: what the columns are called.
        given: ``text``, ``image`` and ``id`` to columns; with a text or an image column, no other
            one of the two is read.
        origin: The data, for messages.
        flag: Of the command, in which the columns are given.

    Raises:
        ConfigError: A given key is unknown.
        DataError: A given column is not there, no column is known, or columns of both roles are.
    """
    for key, column in given.items():
        if key not in COLUMN_KEYS:
            raise ConfigError(f"{flag} {key}={column}: unknown; give {', '.join(COLUMN_KEYS)}")
        if column not in columns:
            raise DataError(
                f"{origin}: {flag} {key}={column}: no such column; the columns are "
                f"{listed(columns)}; correct {flag}"
            )
    own_id = given.get(ID) or next((name for name in ID_NAMES if name in columns), None)
    parts = {part: given[part] for part in (TEXT, IMAGE) if part in given}
    if parts:
        return ItemColumns(parts, own_id, None if role == AUTO else cast(Role, role))
    found = _role_of(columns, origin=origin) if role == AUTO else cast(Role, role)
    parts = _named(columns, found)
    if not parts:
        wanted = [name for names in _wanted(found).values() for name in names]
        raise DataError(
            f"{origin}: no column of items: looked for {listed(wanted)}, the columns are "
            f"{listed(columns)}; name it with {flag} text=COLUMN or image=COLUMN"
        )
    return ItemColumns(parts, own_id, found)


def _role_of(columns: Sequence[str], *, origin: str) -> Role | None:
    """The role that the columns' names tell; ``None`` where only neutral ones are there."""
    told = {
        role: name
        for role, parts in _NAMES.items()
        for names in parts.values()
        for name in reversed(names)
        if name in columns
    }
    if len(told) > 1:
        raise DataError(
            f"{origin}: has queries (column {told['query']!r}) and documents (column "
            f"{told['document']!r}); choose with --role query or --role document"
        )
    return next(iter(told), None)


def _wanted(role: Role | None) -> dict[Part, tuple[str, ...]]:
    own: Mapping[Part, tuple[str, ...]] = {} if role is None else _NAMES[role]
    return {part: (*own.get(part, ()), *_NEUTRAL[part]) for part in (TEXT, IMAGE)}


def _named(columns: Sequence[str], role: Role | None) -> dict[Part, str]:
    found: dict[Part, str] = {}
    for part, names in _wanted(role).items():
        name = next((name for name in names if name in columns), None)
        if name is not None:
            found[part] = name
    return found


def check_parts(
    columns: ItemColumns, *, parts: Sequence[str], streams: Sequence[str], origin: str
) -> None:
    """Refuse items that a model does not embed.

    Args:
        columns: What is read.
        parts: Of the model: kinds of items that it has a tower for.
        streams: Of the model.
        origin: The data, for messages.

    Raises:
        ConfigError: Naming the columns, and what the model embeds.
    """
    for part, column in columns.parts.items():
        if part not in parts:
            raise ConfigError(
                f"{origin}: column {column!r} holds the {part} of an item, but the model embeds "
                f"{' and '.join(parts)}; choose other columns with --columns"
            )
    if len(columns.parts) > 1 and JOINT not in streams:
        one = " or ".join(f"{part}={column}" for part, column in columns.parts.items())
        raise ConfigError(
            f"{origin}: columns {listed(list(columns.parts.values()))} make items of text and image, "
            f"which the model does not embed together; choose one with --columns {one}"
        )


def stated_instruction(settings: Mapping[str, Any], columns: ItemColumns) -> str:
    """What the model was trained to read before items of a role.

    Args:
        settings: Content of ``vembed_config.json``; empty for a plain folder.
        columns: Of the table; without a role there must be nothing to choose from.

    Raises:
        ConfigError: The model has instructions, and it is not said which one applies.
    """
    stated = {role: settings.get(f"{role}_instruction", "") for role in ROLES}
    if columns.role is None and len(set(stated.values())) > 1:
        raise ConfigError(
            "--role auto: the columns do not say whether they hold queries or documents, and the "
            "model reads something else before either; give --role query or --role document"
        )
    return role_instruction(settings, columns.role or "query", flag="--instruction")


def role_instruction(settings: Mapping[str, Any], role: Role, *, flag: str) -> str:
    """What the model was trained to read before items of a role.

    Args:
        settings: Content of ``vembed_config.json``; empty for a plain folder.
        role: Of the items.
        flag: Of the command, which says it otherwise.

    Raises:
        ConfigError: It was trained on several, of which none is chosen.
    """
    instruction = settings.get(f"{role}_instruction", "")
    if instruction is None:
        raise ConfigError(
            "the model was trained on data sets with instructions of their own; say which it shall "
            f'read with {flag} TEXT ({flag} "" for none)'
        )
    return str(instruction)


def load_items(paths: Sequence[str], *, flag: str) -> datasets.Dataset:
    """A table from files, folders or hub names; of what is kept by split, the split ``train``.

    Args:
        paths: As of ``load_table``.
        flag: Of the command, for messages.

    Raises:
        DataError: A path is missing, broken or empty, or two have different columns.
    """
    try:
        return load_table(paths, key="data_path")
    except DataError as error:
        raise DataError(str(error).replace("data_path", flag)) from error


class ItemTable(Dataset[Sample | VembedError]):
    """Reads and encodes the rows of a table; every sample has the one role ``ITEMS``.

    Args:
        table: Memory-mapped.
        columns: What is read of it.
        processor: Encodes items.
        instruction: Of every item.
        image_root: Folder that relative image paths start from; empty for the working folder.
        allow_images_outside_root: Whether image paths may leave ``image_root``.
        allow_image_urls: Whether images may be http and https URLs.
        origin: Name of the data in messages.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        *,
        columns: ItemColumns,
        processor: ItemProcessor,
        instruction: str,
        image_root: str,
        origin: str,
        allow_images_outside_root: bool = False,
        allow_image_urls: bool = False,
    ) -> None:
        self.table = table.select_columns(columns.names)
        self.columns, self.origin, self.instruction = columns, origin, instruction
        self.image_root = image_root
        self._processor = processor
        self._outside, self._urls = allow_images_outside_root, allow_image_urls

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.table.num_rows)

    def item(self, row: int) -> Item:
        """One item, not decoded.

        Raises:
            DataError: A value cannot be used; names row and column.
        """
        place = f"{self.origin}, record {row}"
        try:
            cells = self.table[row]
        except UnicodeDecodeError as error:  # Arrow checks texts only when they are read
            raise DataError(f"{place}: {error}; save the file as UTF-8") from error
        values = {
            part: self._value(part, cells[column], f"{place}, column {column!r}")
            for part, column in self.columns.parts.items()
        }
        if all(value is None for value in values.values()):
            raise DataError(
                f"{place}: has neither text nor image (columns "
                f"{listed(list(self.columns.parts.values()))}); remove the record or fill one in"
            )
        return Item(values.get(TEXT), values.get(IMAGE), self.instruction)

    def __getitem__(self, key: SampleKey | int) -> Sample | VembedError:
        """One encoded row; an error is returned, as in ``PairDataset``."""
        row = key.index if isinstance(key, SampleKey) else key
        try:
            item = self.item(row)
            place = f"{self.origin}, record {row}"
            encoded = self._processor.encode(item, origin=place, augment_seed=None)
        except VembedError as error:
            return error
        return Sample(row, roles={ITEMS: [encoded]}, keys={ITEMS: []})

    def _value(self, part: Part, cell: Any, place: str) -> Any:
        value = only_value(cell, "item", place=place)
        if len(self.columns.parts) > 1 and is_absent(value):
            return None
        if part == TEXT:
            return checked_text(value, place=place)
        image = checked_image(value, place=place)
        if not isinstance(image, str):
            return image
        return resolve_image_path(
            image,
            image_root=self.image_root,
            place=place,
            allow_outside=self._outside,
            allow_urls=self._urls,
        )
