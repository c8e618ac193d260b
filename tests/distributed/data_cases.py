"""What a rank of a test world runs of the data package."""

from __future__ import annotations

from vembed_ds.data.fingerprint import fingerprint
from vembed_ds.data.readers import load_table


def fingerprint_of(*, path: str) -> str:
    """The table's fingerprint, as this rank gets it."""
    return fingerprint(load_table([path], key="data_path"))
