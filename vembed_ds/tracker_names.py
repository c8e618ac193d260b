"""The trackers that a run can name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow")
ALL = ("tensorboard", "wandb")
"""What ``all`` has meant since before there were others; it never grows."""


def tracker_names(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """The trackers that ``report_to`` asks for, each once, in the order in which it names them.

    Args:
        report_to: A name, several with commas between them, or a list of names; ``none`` and ``all``
            stand alone.

    Raises:
        ValueError: Saying which name is wrong.
    """
    given = report_to.split(",") if isinstance(report_to, str) else report_to
    names = [name.strip() for name in given]
    if names == ["none"] or not names:
        return ()
    if names == ["all"]:
        return ALL
    for name in names:
        if name in ("none", "all"):
            raise ValueError(f"{name} stands alone; remove it, or the others")
        if name not in TRACKERS:
            near = get_close_matches(name, TRACKERS, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"no tracker {name!r}{meant}: expected one or several of {', '.join(TRACKERS)}, or "
                "none or all alone"
            )
    return tuple(dict.fromkeys(names))
