"""The data's fingerprint is shared work whose result does not depend on who shares it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.worlds import World
from vembed_ds.data.fingerprint import ROWS_PER_BLOCK

CASE = "tests.distributed.data_cases:fingerprint_of"


def test_the_number_of_ranks_does_not_change_it(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(2 * ROWS_PER_BLOCK + 7)]
    for name, changed in (("a", rows), ("b", [*rows[:-1], rows[0]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, changed)))
    first, second = world(2).run(CASE, path=str(tmp_path / "a.jsonl"))
    assert first == second == world(1).run(CASE, path=str(tmp_path / "a.jsonl"))[0]
    assert world(2).run(CASE, path=str(tmp_path / "b.jsonl"))[0] != first
