"""A log line as people read it; the files have every metric with all its digits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vembed_ds.training.summary import duration

# In the files only: what the pairs per second of the line say too, and parts of parts, such as
# train/loss_dim_64_query_to_doc.
_UNTOLD = ("train/data_wait_seconds", "train/samples_per_second", "_dim_")


def log_text(metrics: Mapping[str, float], *, step: int, num_steps: int) -> str:
    """``step 20 of 600: loss 4.7986, lr 0.00076, ..., 54 pairs/s, 6 min 10 s left``.

    Args:
        metrics: Of a log line or an evaluation, by their full names.
        step: Behind which they are told.
        num_steps: Of the whole run.
    """
    # The first step is far slower than those behind it.
    left = num_steps - step if step > 1 else 0
    return f"step {step:,} of {num_steps:,}: {', '.join(_parts(metrics, left))}"


def _parts(metrics: Mapping[str, float], steps_left: int) -> Iterator[str]:
    for name, value in metrics.items():
        group, _, rest = name.partition("/")
        if group not in ("train", "eval") or any(word in name for word in _UNTOLD):
            continue
        if name == "train/skipped_steps" and not value:
            continue
        yield f"{rest if group == 'train' else name} {_number(value)}"
    if "train/samples_per_second" in metrics:
        yield f"{metrics['train/samples_per_second']:.3g} pairs/s"
    if "perf/step_seconds" in metrics and steps_left:
        yield f"{duration(metrics['perf/step_seconds'] * steps_left)} left"


def _number(value: float) -> str:
    """Five digits, and whole numbers as they are."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.5g}"
