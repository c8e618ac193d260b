"""Start-up without a launcher of ours."""

from __future__ import annotations

import pytest

from vembed_ds.distributed import comm
from vembed_ds.errors import DistributedError


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_do_not_know_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "4")
    with pytest.raises(DistributedError, match=r"is not set, though .* started this process: set"):
        comm.init_distributed(device_type="cpu", timeout_minutes=1)
