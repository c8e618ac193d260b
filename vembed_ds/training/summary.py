"""What a run says of itself when it is done: pure text from plain facts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vembed_ds.training.banner import WIDTH, headline, labelled, of_memory
from vembed_ds.training.log_window import LogWindow

MOST_METRICS = 6


@dataclass
class RunRecord:
    """What a loop notes of a run for its end; of what was made here, not before it was resumed.

    Attributes:
        seconds: From the first batch to the last checkpoint.
        pauses: Seconds of them that were no training, by what they were spent on.
        waited: Seconds of the training that this rank waited for data.
        steps: Made here.
        pairs: Of all ranks in them.
        losses: First and last that was logged.
        evaluations: First and last, each with the steps that were done.
        peaks: Most memory of any rank, by its metric.
    """

    seconds: float = 0.0
    pauses: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0
    steps: int = 0
    pairs: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)

    def note_times(self, window: LogWindow) -> None:
        """Take the times of a window that is over into account."""
        self.waited += window.waited
        for what, seconds in window.pauses.items():
            self.pauses[what] = self.pauses.get(what, 0.0) + seconds

    def note_line(self, metrics: Mapping[str, float]) -> None:
        """Take a log line into account."""
        self.losses = [*self.losses[:1], metrics["train/loss"]]
        self.peaks |= {name: value for name, value in metrics.items() if "/peak_" in name}

    def note_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take an evaluation into account."""
        if metrics:
            self.evaluations = [*self.evaluations[:1], (step, dict(metrics))]


@dataclass(frozen=True)
class EndFacts:
    """A run that is done.

    Attributes:
        output_dir: Of the run.
        step: Optimizer steps done, those before it was resumed included.
        record: Of the loop.
        best: Metric, value and step of the best evaluation; ``None``: none was looked for.
        checkpoint: The last one's name.
        val_data: What to evaluate on; ``None``: nothing is known.
        trackers: Names.
    """

    output_dir: str
    step: int
    record: RunRecord
    best: tuple[str, float, int] | None
    checkpoint: str
    val_data: str | None
    trackers: Sequence[str]


def summary(facts: EndFacts) -> str:
    """At most 25 lines."""
    rows = [headline(f"done: {facts.output_dir}")]
    rows += [row for label, lines in _rows(facts) for row in labelled(label, lines)]
    return "\n".join([*rows, "-" * WIDTH])


def duration(seconds: float) -> str:
    """``0.3 s``, ``42 s``, ``3 min 20 s``, ``5 h 02 min``, ``3 d 4 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _rows(facts: EndFacts) -> Iterator[tuple[str, list[str]]]:
    record = facts.record
    pauses = ", ".join(f"{what} {duration(s)}" for what, s in record.pauses.items())
    trained = max(record.seconds - sum(record.pauses.values()), 0.0)
    yield (
        "time",
        [
            duration(record.seconds),
            f"training {duration(trained)} ({duration(record.waited)} of it waiting for data)"
            f"{', ' if pauses else ''}{pauses}",
        ],
    )
    rate = f", {record.pairs / trained:,.1f} pairs/s" if trained and record.pairs else ""
    before = (
        ""
        if record.steps == facts.step
        else f" of {facts.step:,}, the others before it was resumed"
    )
    yield "steps", [f"{record.steps:,}{before}: {record.pairs:,} pairs{rate}"]
    if record.losses:
        yield "loss", [" -> ".join(f"{loss:.4g}" for loss in dict.fromkeys(record.losses))]
    yield from _evaluations(record.evaluations)
    if facts.best is not None:
        name, value, step = facts.best
        yield "best", [f"{name} {value:.4f} at step {step:,}, checkpoint-step-{step}"]
    yield "memory", [_peaks(record.peaks)] if record.peaks else []
    yield "checkpoint", [f"{facts.output_dir}/{facts.checkpoint}"]
    yield "next", [*_commands(facts)]


def _evaluations(
    found: Sequence[tuple[int, Mapping[str, float]]],
) -> Iterator[tuple[str, list[str]]]:
    if not found:
        return
    steps = [step for step, _ in found]
    last = found[-1][1]
    names = [name for name in last if not name.rpartition("/")[2].startswith("num_")]
    wide = max(len(name) for name in names[:MOST_METRICS])
    lines = [" " * wide + "".join(f"{f'step {step:,}':>14}" for step in steps)]
    for name in names[:MOST_METRICS]:
        values = [metrics.get(name) for _, metrics in found]
        lines.append(
            name.ljust(wide) + "".join(f"{'-' if v is None else f'{v:.4f}':>14}" for v in values)
        )
    if len(names) > MOST_METRICS:
        lines.append(f"... and {len(names) - MOST_METRICS} more in metrics.csv")
    yield "evaluation", lines


def _peaks(peaks: Mapping[str, float]) -> str:
    words = {
        "perf/peak_memory_bytes": "on the device",
        "perf/peak_host_memory_bytes": "on the host",
    }
    told = [f"{of_memory(peaks[name])} {where}" for name, where in words.items() if name in peaks]
    return f"at most {' and '.join(told)} of a rank"


def _commands(facts: EndFacts) -> Iterator[str]:
    folder = shlex.quote(facts.output_dir)
    model = shlex.quote(f"{facts.output_dir}/model")
    yield f"vembed-ds convert {folder} {model}"
    if facts.val_data is not None:
        yield f"vembed-ds evaluate --model {model} --data {shlex.quote(facts.val_data)}"
    if "tensorboard" in facts.trackers:
        yield f"tensorboard --logdir {shlex.quote(f'{facts.output_dir}/tensorboard')}"


def best_of(best: Any) -> tuple[str, float, int] | None:
    """What a saver says of the best evaluation."""
    return None if best is None else (best.metric, best.value, best.step)
