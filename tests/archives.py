"""WebDataset shards for tests."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path


def write_tar(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    """An archive with these members, in this order."""
    with tarfile.open(folder / name, "w") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return folder / name
