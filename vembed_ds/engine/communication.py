"""DeepSpeed's view of the process group, without the shared memory it would leave behind."""

from __future__ import annotations

import os

import deepspeed

from vembed_ds.distributed import comm

_LOCAL_SIZE = "LOCAL_SIZE"


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group that exists. Collective; later calls do nothing.

    Its own groups get the timeout of that group: torch's default is 30 minutes with gloo.

    On a CPU, DeepSpeed 0.19.8 gives every rank of a single machine a buffer of 69 MB under
    ``/dev/shm`` for a reduction of its inference code, and never removes it: 300 starts filled the
    memory of a machine with 24 GiB, until the kernel killed a training. It does so when
    ``LOCAL_SIZE`` says that all ranks are on this machine, so it does not get to see that.
    """
    local_size = os.environ.pop(_LOCAL_SIZE, None)
    try:
        deepspeed.init_distributed(verbose=False)
    finally:
        if local_size is not None:
            os.environ[_LOCAL_SIZE] = local_size
    deepspeed.comm.comm.cdb.new_group = comm.subgroup
