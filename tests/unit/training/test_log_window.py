"""What a checkpoint keeps for the next log line."""

from __future__ import annotations

import json

import torch

from vembed_ds.training.log_window import LogWindow, resumed_window


def test_a_window_goes_on_where_it_was() -> None:
    window, later = LogWindow(skipped=1), torch.tensor(0.3)
    window.add(torch.tensor(0.1), {"task": torch.tensor(0.7)})
    resumed = resumed_window(json.loads(json.dumps(window.state())))
    assert (resumed.summed, resumed.skipped, resumed.timed) == (1, 1, 0)
    for one in (window, resumed):
        one.add(later, {"task": later})
    assert (resumed.loss, resumed.parts) == (window.loss, window.parts)


def test_of_other_ranks_there_is_the_mean() -> None:
    ranks = [{"loss": loss, "parts": {"task": 2 * loss}} for loss in (1.0, 3.0)]
    resumed = resumed_window({"summed": 4, "skipped": 0, "ranks": ranks})
    assert (resumed.loss, resumed.parts, resumed.summed) == (2.0, {"task": 4.0}, 4)


def test_a_checkpoint_of_an_earlier_version_begins_a_line() -> None:
    resumed = resumed_window(None)
    assert (resumed.loss, resumed.parts, resumed.summed, resumed.skipped) == (0.0, {}, 0, 0)
