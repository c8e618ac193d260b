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
    if ref.startswith("package:"):
        return _package_folder(ref)
    path = Path(os.path.expanduser(ref))  # noqa: PTH111 (pathlib raises for an unknown ~user)
    if path.is_dir():
        return str(path.absolute())
    if ref.startswith(("/", "./", "../", "~")) or not _HUB_NAME.fullmatch(ref):
        raise ConfigError(
            f"{ref!r}: no such folder; check the path, or give a hub name or package:NAME/folder"
        )
    return ref


def _package_folder(ref: str) -> str:
    match = _PACKAGE.fullmatch(ref)
    if match is None:
        raise ConfigError(f"{ref!r}: expected package:IMPORT_NAME or package:IMPORT_NAME/folder")
    name, folder = match.groups()
    spec = importlib.util.find_spec(name)
    if spec is None:
        hint = name.replace("_", "-")
        raise ConfigError(
            f"{ref!r}: the Python package {name} is not installed; try: pip install {hint}"
        )
    for place in spec.submodule_search_locations or ():
        if Path(place + folder).is_dir():
            return str(Path(place + folder))
    raise ConfigError(
        f"{ref!r}: the Python package {name} has no folder {folder.strip('/') or name}"
    )
