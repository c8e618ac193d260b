"""DeepSpeed's view of the process group, without what only its inference code would use."""

from __future__ import annotations

import deepspeed
from deepspeed.utils import groups

from vembed_ds.distributed import comm

_SHARED_MEMORY = "deepspeed_shm_comm"


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group that exists. Collective; later calls do nothing.

    Its own groups get the timeout of that group: torch's default is 30 minutes with gloo.

    On a CPU, DeepSpeed 0.19.8 compiles an extension for a reduction of its inference code, which
    takes half a minute at the first start on a machine. It then gives every rank of a single machine a
    buffer of 69 MB under ``/dev/shm``, and never removes it: 300 starts filled the memory of a machine
    with 24 GiB, until the kernel killed a training. So DeepSpeed is told that it cannot be compiled,
    before it runs compilers to find out what can; it asks for nothing else.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})[_SHARED_MEMORY] = False
    deepspeed.init_distributed(verbose=False)
    deepspeed.comm.comm.cdb.new_group = comm.subgroup


def leave_deepspeed() -> None:
    """Let DeepSpeed forget the process group, which is gone; another one may be joined later.

    It keeps the groups that it made in globals, and would use them in the next.
    """
    groups._release_process_group_references()
