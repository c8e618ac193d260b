"""YAML as a person reads it: YAML 1.2 scalars, and no key twice.

PyYAML speaks YAML 1.1, in which ``1e-4`` is text, ``no`` is false, ``010`` is eight and
``12:30`` is 750.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vembed_ds.errors import ConfigError

MAX_CHARACTERS = 10**6
MAX_VALUES = 10**5

_INT = r"[-+]?[0-9]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (_INT, list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands here a second time; keep one",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either YAML version would take for something else."""


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first
        )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def parse_yaml(text: str, *, origin: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        origin: File or option it came from, for the message.

    Returns:
        What the document holds; None when it is empty.

    Raises:
        ConfigError: On a syntax error, a tag that would make a Python object, or a key given
            twice, naming the line; on a text that is too long, too deep or multiplies itself.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{origin}: {len(text)} characters are no configuration (at most {MAX_CHARACTERS}); "
            "is it another file?"
        )
    try:
        return _parse(text, origin=origin)
    except RecursionError as error:
        raise ConfigError(f"{origin}: nested too deep; flatten it") from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or error.context
        raise ConfigError(f"{origin}{line}: not readable as YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not readable as YAML: {error}") from error


def _parse(text: str, *, origin: str) -> Any:
    loader: Any = _Loader(text)  # PyYAML leaves these methods untyped
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > MAX_VALUES:
            raise ConfigError(
                f"{origin}: its aliases (*name) stand for more than {MAX_VALUES} values, or for "
                "themselves; write the values out"
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Values that a node stands for when every alias is written out; infinite in a circle.

    Nine lists of nine aliases each take nine lines and stand for 387 million values.
    """
    if id(node) not in known:
        known[id(node)] = float("inf")
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in inner)
    return known[id(node)]


def read_yaml_mapping(path: Path) -> dict[Any, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: When the file is missing, unreadable, not YAML or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the config file cannot be read: {error}") from error
    values = parse_yaml(text, origin=str(path))
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{path}: expected a mapping of `key: value` lines, found {found}")
    return values


def parse_scalar(text: str) -> Any:
    """Read an unquoted word as a YAML file would: a number, true, false, null, else text."""
    loader: Any = _Loader("")  # PyYAML leaves these methods untyped
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))


def dump_yaml(values: dict[str, Any]) -> str:
    """Write a mapping, keys in their order, so that :func:`parse_yaml` reads the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
