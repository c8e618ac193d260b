"""What a checkpoint keeps for the next log line."""

from __future__ import annotations

import json
import time

import pytest
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
    assert resumed.counts == window.counts == {"task": 2}


def test_a_part_is_counted_in_its_own_steps() -> None:
    window = LogWindow()
    for parts in ({"data_a": 1.0}, {"data_b": 5.0}, {"data_a": 3.0}):
        window.add(torch.tensor(1.0), {name: torch.tensor(part) for name, part in parts.items()})
    assert (window.summed, window.counts) == (3, {"data_a": 2, "data_b": 1})


def test_a_pause_is_no_training() -> None:
    window = LogWindow()
    started = window.started
    with window.paused("checkpoint"):
        time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), window.paused("checkpoint"):
        raise ZeroDivisionError
    assert 0.02 <= window.pauses["checkpoint"] < 2
    assert window.started - started == pytest.approx(window.pauses["checkpoint"])


def test_of_other_ranks_there_is_the_mean() -> None:
    ranks = [{"loss": loss, "parts": {"task": 2 * loss}} for loss in (1.0, 3.0)]
    resumed = resumed_window({"summed": 4, "skipped": 0, "ranks": ranks})
    assert (resumed.loss, resumed.parts, resumed.summed) == (2.0, {"task": 4.0}, 4)
    assert resumed.counts == {"task": 4}  # of an earlier version


def test_a_checkpoint_of_an_earlier_version_begins_a_line() -> None:
    resumed = resumed_window(None)
    assert (resumed.loss, resumed.parts, resumed.summed, resumed.skipped) == (0.0, {}, 0, 0)
