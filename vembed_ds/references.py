"""Model references: a hub name, a folder, or a folder inside an installed Python package."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from vembed_ds.errors import ConfigError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PACKAGE = re.compile(r"package:(\w+)((?:/[\w.-]+)*)")


def resolve_model_reference(ref: str) -> str:
    """Turn a reference into what ``from_pretrained`` takes.

    ``package:NAME/folder`` is a folder shipped in an installed package, which is located without
    being imported. A path is made absolute when it exists. Anything else is taken as a hub name.

    Args:
        ref: Hub name, folder, or ``package:IMPORT_NAME/sub/folder``.

    Returns:
        Absolute path of an existing folder, or the hub name unchanged.

    Raises:
        ConfigError: When the package or the folder does not exist.
    """
    if problem := reference_problem(ref):
        raise ConfigError(f"{ref!r}: {problem}")
    if ref.startswith("package:"):
        return _package_folders(ref)[0]
    folder = Path(_expand(ref))
    return str(folder.absolute()) if folder.is_dir() else ref


def reference_problem(ref: str) -> str | None:
    """Say why a reference cannot be resolved; ``None`` when it can, as far as can be seen here.

    Whether a hub name exists is not known before it is loaded.
    """
    if ref.startswith("package:"):
        return _package_problem(ref)
    if Path(_expand(ref)).is_dir():
        return None
    if ref.startswith(("/", "./", "../", "~")) or not _HUB_NAME.fullmatch(ref):
        return "no such folder; check the path, or give a hub name or package:NAME/folder"
    return None


def _expand(ref: str) -> str:
    return os.path.expanduser(ref)  # noqa: PTH111 (pathlib raises for ~nobody)


def _package_problem(ref: str) -> str | None:
    match = _PACKAGE.fullmatch(ref)
    if match is None:
        return "expected package:IMPORT_NAME or package:IMPORT_NAME/folder"
    name, folder = match.groups()
    if importlib.util.find_spec(name) is None:
        hint = name.replace("_", "-")
        return f"the Python package {name} is not installed; try: pip install {hint}"
    if not _package_folders(ref):
        return f"the Python package {name} has no folder {folder.strip('/') or name}"
    return None


def _package_folders(ref: str) -> list[str]:
    match = _PACKAGE.fullmatch(ref)
    spec = importlib.util.find_spec(match[1]) if match else None
    if match is None or spec is None:
        return []
    places = [Path(place + match[2]) for place in spec.submodule_search_locations or ()]
    return [str(place) for place in places if place.is_dir()]
