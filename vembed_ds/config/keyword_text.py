"""The keywords of ``TrainConfig`` for editors: ``python -m vembed_ds.config.keyword_text``.

Editors and type checkers read files and run nothing, so ``keywords.py`` is written from the schema, and
a test compares the two.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from vembed_ds.config.schema import ALIASES, SECTION_OF, SECTIONS

_HEAD = '''"""The keywords of ``TrainConfig``, written by ``python -m vembed_ds.config.keyword_text``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

StrPath = str | PathLike[str]


class Settings(TypedDict, total=False):
    """Every key of a configuration, flat; or whole sections.

    What the keys mean, and their defaults: the README's tables. vembed-factory's other keys are
    accepted too, as its files are, and are left out here.
    """
'''
_PATHS = ("_path", "_dir", "_root", "model_name", "teacher_cache", "teacher_ds_config")


def keyword_text() -> str:
    """Content of ``keywords.py``."""
    lines = [_HEAD]
    for section, schema in SECTIONS.items():
        lines.append(f"    {section}: Mapping[str, Any]")
        lines += [f"    {key}: {_type_of(key)}" for key in schema.model_fields]
        lines += _aliases_of(section)
        lines.append("")
    return "\n".join(lines)


def _aliases_of(section: str) -> Iterator[str]:
    for alias, key in ALIASES.items():
        if SECTION_OF[key] == section:
            yield f"    {alias}: {_type_of(key)}"
    if section == "model":
        yield "    torch_dtype: str | None"


def _type_of(key: str) -> str:
    annotation = SECTIONS[SECTION_OF[key]].model_fields[key].annotation
    return " | ".join(dict.fromkeys(_types(annotation, is_path=key.endswith(_PATHS))))


def _types(annotation: Any, *, is_path: bool) -> Iterator[str]:
    """The members of the union that a value may be."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _types(args[0], is_path=is_path)
    elif origin in (Union, UnionType):
        for arg in args:
            yield from _types(arg, is_path=is_path)
    elif origin is Literal:
        yield f"Literal[{', '.join(json.dumps(choice) for choice in args)}]"
    elif origin is tuple:
        yield f"Sequence[{' | '.join(_types(args[0], is_path=is_path))}]"
    elif origin is dict or issubclass(annotation, BaseModel):
        yield "Mapping[str, Any]"
    elif annotation is NoneType:
        yield "None"
    else:
        yield "StrPath" if annotation is str and is_path else annotation.__name__


if __name__ == "__main__":
    sys.stdout.write(keyword_text())
