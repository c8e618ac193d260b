"""Where a rank is, in one line."""

from __future__ import annotations

from vembed_ds.distributed.places import place


def test_a_place_is_the_innermost_line_and_the_package_s_own() -> None:
    lines = ["torch/c10d.py:7", "vembed_ds/distributed/comm.py:9", "vembed_ds/training/loop.py:3"]
    assert place(lines) == "vembed_ds/training/loop.py:3, in torch/c10d.py:7"
    assert place(["data.py:7"]) == "data.py:7"
    assert place([]) == "?"
