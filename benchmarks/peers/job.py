"""What a peer is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.task import EXACT, TIMED, Task, read_tensors
from vembed_ds.distributed import comm


class Setting(NamedTuple):
    """Where and how everybody trains.

    Attributes:
        device: ``cpu`` or ``cuda``.
        bf16: Whether the encoders compute in 16 bit; everybody's weights stay float32.
        warm_up: Steps before those that are timed.
        tolerance: Of the gate: relative, of the first loss and the first gradient's norm.
        later_tolerance: The same of the second loss.
    """

    device: str = "cpu"
    bf16: bool = False
    warm_up: int = 1
    # A wrong gradient is off by 1e-2 and more; torch's float32 sum of the squares of 14 million
    # numbers by 2e-5. Adam's first update is a sign, which rounding can turn near 0.
    tolerance: float = 1e-4
    later_tolerance: float = 1e-3


CPU = Setting()


@dataclass(frozen=True)
class Variant:
    """One way of training a task.

    Attributes:
        name: In tables.
        peer: Whose way it is; ``--peers`` chooses by it.
        run: ``module:function`` of ``(job, meter)`` that trains.
        options: Of that function.
        code: The ``--option`` with the path of the peer's code; empty: it is installed, or ours.
        symmetric: Whether its loss has both directions; ``None``: as the task's.
        frozen_text: Whether the text tower is not trained.
    """

    name: str
    peer: str
    run: str
    options: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""
    symmetric: bool | None = None
    frozen_text: bool = False


@dataclass(frozen=True)
class Job:
    """A variant's training in this process.

    Attributes:
        task: What is trained.
        folder: From :func:`benchmarks.task.write_task`.
        options: The variant's.
        symmetric: Whether the loss has both directions.
        frozen_text: Whether the text tower is not trained.
        timed: Whether dropout is on, as it is where time is measured; without it everybody computes
            the same.
        code: Where the peer's code is, if it is not installed.
        scratch: A folder of its own.
        setting: Where and how.
    """

    task: Task
    folder: Path
    options: Mapping[str, Any]
    symmetric: bool
    frozen_text: bool
    timed: bool
    code: Path | None
    scratch: Path
    setting: Setting

    @property
    def model(self) -> Path:
        """A Hugging Face folder."""
        return self.folder / (TIMED if self.timed else EXACT)

    def batch(self) -> dict[str, dict[str, Tensor]]:
        """This rank's pairs, by role and argument of the model, on the device."""
        first = comm.rank() * self.task.pairs_per_rank
        own = slice(first, first + self.task.pairs_per_rank)
        return {
            role: {name: values[own].to(self.setting.device) for name, values in inputs.items()}
            for role, inputs in read_tensors(self.folder).items()
        }
