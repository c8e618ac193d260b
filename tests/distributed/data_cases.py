"""What a rank of a test world runs of the data package."""

from __future__ import annotations

from tests.loader_probes import Probe
from vembed_ds.data.fingerprint import fingerprint
from vembed_ds.data.loader import BatchLoader
from vembed_ds.data.readers import load_table
from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError


def fingerprint_of(*, path: str) -> str:
    """The table's fingerprint, as this rank gets it."""
    return fingerprint(load_table([path], key="data_path"))


def first_error(*, action: str, seconds: float) -> str:
    """Load as a trainer does, while a loader process of rank 0 meets ``action`` at row 2."""
    probe = Probe(action, at=2 if comm.rank() == 0 else -1)
    batches = [[row] for row in range(4)]
    options = {"num_workers": 1, "prefetch_factor": 2, "timeout_seconds": seconds}
    try:
        for batch in BatchLoader(probe, batches, **options):
            comm.raise_together(batch.error)
    except VembedError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
