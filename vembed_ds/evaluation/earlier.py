"""An earlier evaluation, to compare with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vembed_ds.errors import DataError
from vembed_ds.evaluation.scoring import Values
from vembed_ds.evaluation.tasks import RetrievalTask


@dataclass(frozen=True)
class Before:
    """An earlier evaluation.

    Attributes:
        metrics: Metric to value.
        per_query: Metric to the value of every query, where it was stored.
        fingerprint: Of the data, where it was stored.
    """

    metrics: dict[str, float]
    per_query: Values | None = None
    fingerprint: str | None = None


def read_before(path: Path) -> Before:
    """Metrics of an earlier evaluation: a report, or a JSON object of numbers.

    Names may begin with ``eval/``, as the trackers have them.

    Raises:
        DataError: When the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--before {path}: cannot be read as JSON ({error})") from error
    metrics = content.get("metrics", content) if isinstance(content, dict) else None
    if not isinstance(metrics, dict) or not all(_is_number(v) for v in metrics.values()):
        raise DataError(
            f"--before {path}: holds no metrics; give a file that --output wrote, "
            'or {"recall@1": 0.1, ...}'
        )
    stored = content.get("per_query") if "metrics" in content else None
    return Before(
        # A line of metrics.jsonl also says at which step it was measured.
        {name.removeprefix("eval/"): v for name, v in metrics.items() if name != "step"},
        None if stored is None else {name: np.array(values) for name, values in stored.items()},
        content.get("fingerprint") if "metrics" in content else None,
    )


def check_same_data(before: Before, task: RetrievalTask, *, path: str) -> None:
    """Refuse to compare measurements of different things, where that is known.

    Raises:
        DataError: The earlier evaluation was of other data.
    """
    if before.fingerprint is not None and before.fingerprint != task.fingerprint:
        raise DataError(
            f"--before {path}: was measured on other queries, documents or judgments than "
            f"{task.origin}; evaluate both models on the same data"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
