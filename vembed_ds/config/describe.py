"""Plain words for the type of a field, for error messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}
_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def describe_field(field: FieldInfo) -> str:
    """Say what a field accepts, for example ``a whole number > 0 or null``.

    Args:
        field: A field of a section in :mod:`vembed_ds.config.schema`.
    """
    return _describe(field.annotation, field.metadata)


def entry_type(field: FieldInfo) -> type[BaseModel] | None:
    """The mapping that a list of mappings holds; ``None``: the field is no such list."""
    arguments = get_args(field.annotation)
    if get_origin(field.annotation) is not tuple or not isinstance(arguments[0], type):
        return None
    return arguments[0] if issubclass(arguments[0], BaseModel) else None


def _describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    limits = list(_limits(metadata))
    if origin is Annotated:
        return _describe(args[0], args[1:])
    if origin is Literal:
        return " or ".join(str(choice) for choice in args)
    if origin in (Union, UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is tuple:
        return f"a {_non_empty(limits)}list of {_describe(args[0])}"
    if origin is dict:
        return "a mapping" if Any in args else f"a mapping of text to {_describe(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping with " + ", ".join(annotation.model_fields)
    bounds = [
        f"{sign} {getattr(n, key)}" for n in limits for key, sign in _SIGNS if hasattr(n, key)
    ]
    return " ".join([_non_empty(limits) + _NAMES[annotation], " and ".join(bounds)]).strip()


def _limits(metadata: Iterable[Any]) -> Iterator[Any]:
    """Limits, as pydantic keeps them: directly, or inside a FieldInfo of an Annotated type."""
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else [item]


def _non_empty(limits: Iterable[Any]) -> str:
    return "non-empty " if any(hasattr(limit, "min_length") for limit in limits) else ""
