"""The metrics of one log line, from what all ranks saw since the line before.

docs/follow.md lists them all, and a test compares the list with what runs write.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from vembed_ds.distributed import comm
from vembed_ds.losses import Watched
from vembed_ds.steps.gradient_cache import StepResult
from vembed_ds.training.embedding_figures import EmbeddingSample, finished
from vembed_ds.training.log_window import LogWindow
from vembed_ds.training.step_work import StepWork


class SeenStep(NamedTuple):
    """What is kept of a step that is logged.

    Attributes:
        sample: Of its embeddings.
        watched: What its loss said.
    """

    sample: EmbeddingSample
    watched: Watched


@dataclass
class OverRanks:
    """Values of this rank, to be combined with those of the others in one exchange.

    Attributes:
        mean: By name, whose mean over the ranks is wanted.
        total: Likewise, the sum.
        largest: Likewise, the maximum.
    """

    mean: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    def combined(self) -> OverRanks:
        """The same names with the values of all ranks, on every rank. Collective.

        The ranks have the same names in the same order.
        """
        groups = (self.mean, self.total, self.largest)
        own = [value for group in groups for value in group.values()]
        table = np.array(comm.all_gather_floats(own), dtype=np.float64)
        ends = np.cumsum([len(group) for group in groups])[:-1]
        mean, total, largest = np.split(table, ends, axis=1)
        return OverRanks(
            _named(self.mean, mean.mean(axis=0)),
            _named(self.total, total.sum(axis=0)),
            _named(self.largest, largest.max(axis=0, initial=-math.inf)),
        )


def log_line(
    window: LogWindow,
    *,
    result: StepResult,
    norm: Tensor | None,
    rates: Mapping[str, float],
    seen: SeenStep | None,
    sent_bytes: float,
    peak_device_bytes: int,
) -> dict[str, float]:
    """The metrics of the steps in a window, the same on every rank. Collective.

    Waits for the device.

    Args:
        window: This rank's; it has at least one step that was made here.
        result: Of its last step.
        norm: Of the last step's gradient; ``None``: there was no update.
        rates: Learning rates of the last step, by name.
        seen: What was kept of the last step; ``None``: nothing.
        sent_bytes: That this rank sends in a step, as predicted.
        peak_device_bytes: The most that this rank has held on an accelerator; 0: it has none.
    """
    seconds = time.perf_counter() - window.started
    on_host = _fetch(window, result, norm, seen)
    found = _own(window, on_host, seconds=seconds, sent_bytes=sent_bytes)
    if peak_device_bytes:
        found.largest["perf/peak_memory_bytes"] = peak_device_bytes
    if seen is not None:
        found.mean |= seen.sample.figures()
    line = found.combined()
    metrics = {
        "train/loss": line.mean.pop("train/loss"),
        **rates,
        "train/grad_norm": on_host.get("norm", math.nan),
        "train/samples_per_second": line.total["pairs"] / seconds,
        "train/data_wait_seconds": line.mean.pop("train/data_wait_seconds"),
        "train/skipped_steps": float(window.skipped),
    }
    if "logit_scale" in on_host:
        metrics["train/temperature"] = math.exp(-on_host["logit_scale"])
    if "logit_bias" in on_host:
        metrics["train/logit_bias"] = on_host["logit_bias"]
    metrics |= finished(line.mean)
    metrics["perf/step_seconds"] = seconds / window.timed
    metrics |= _of_work(StepWork(*(int(line.total[n]) for n in StepWork._fields)), seconds)
    return metrics | line.largest


def peak_device_bytes() -> int:
    """The most that this rank has held on its accelerator since it was last forgotten; 0 on a CPU."""
    accelerator = get_accelerator()
    return 0 if accelerator.device_name() == "cpu" else int(accelerator.max_memory_allocated())


def peak_host_bytes() -> int:
    """The most memory that this process has had on the host."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _own(
    window: LogWindow, on_host: Mapping[str, float], *, seconds: float, sent_bytes: float
) -> OverRanks:
    waited = window.waited / window.timed
    found = OverRanks(
        mean={
            "train/loss": on_host["loss"] / (window.summed or math.nan),
            "train/data_wait_seconds": waited,
        },
        total={"pairs": window.pairs, **window.work._asdict()},
        largest={
            "perf/data_wait_seconds_max": waited,
            "perf/predicted_bytes_per_step": sent_bytes,
            "perf/peak_host_memory_bytes": peak_host_bytes(),
        },
    )
    for name in window.parts:
        found.mean[f"train/loss_{name}"] = on_host[f"part {name}"] / window.counts[name]
    if "accuracy" in on_host:
        found.mean["train/in_batch_accuracy"] = on_host["accuracy"]
    for what, spent in window.pauses.items():
        found.largest[f"perf/{what}_seconds"] = spent
    return found


def _of_work(work: StepWork, seconds: float) -> dict[str, float]:
    """Of all ranks together."""
    found = {}
    if work.tokens:
        found["perf/tokens_per_second"] = work.tokens / seconds
        found["perf/padding_ratio"] = work.padded_tokens / work.tokens
    if work.patches:
        found["perf/patches_per_second"] = work.patches / seconds
    if work.chunks:
        found["perf/recompute_share"] = work.replayed / work.chunks
    return found


def _fetch(
    window: LogWindow, result: StepResult, norm: Tensor | None, seen: SeenStep | None
) -> dict[str, float]:
    """Everything small that lies on the device, in one transfer."""
    values: dict[str, Tensor | float] = {"loss": window.loss, **result.learned}
    values = {
        name: v for name, v in values.items() if name in ("loss", "logit_scale", "logit_bias")
    }
    values |= {f"part {name}": part for name, part in window.parts.items()}
    if norm is not None:
        values["norm"] = norm
    if seen is not None and seen.watched.accuracy is not None:
        values["accuracy"] = seen.watched.accuracy
    device = result.loss.device
    tensors = [
        torch.as_tensor(v, dtype=torch.float64).to(device).reshape(()) for v in values.values()
    ]
    return dict(zip(values, torch.stack(tensors).tolist(), strict=True))


def _named(names: Mapping[str, float], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
