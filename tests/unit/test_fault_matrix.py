"""The fault matrix has every fault, and the documentation shows the same tests."""

from __future__ import annotations

import re

import pytest

from tests.faults.matrix import MATRIX
from tests.unit.test_defect_table import NAMED, problem, tables


def test_every_fault_has_tests() -> None:
    assert list(MATRIX) == [f"F{number}" for number in range(1, 38)]
    assert all(MATRIX.values())


@pytest.mark.parametrize("fault", MATRIX)
def test_they_exist(fault: str) -> None:
    for test in MATRIX[fault]:
        path, _, name = test.partition("::")
        assert problem(path, name, "") is None


def test_the_documentation_names_the_same() -> None:
    rows = [row for row in tables("checkpoints.md") if re.fullmatch(r"F\d+", row[0])]
    named = {
        row[0]: tuple(f"{path}::{test}" for path, test, _ in NAMED.findall(row[-1])) for row in rows
    }
    assert named == MATRIX


def test_they_carry_the_marker(request: pytest.FixtureRequest) -> None:
    marked = {
        item.nodeid.partition("[")[0]
        for item in request.session.items
        if item.get_closest_marker("faults")
    }
    collected = {item.nodeid.partition("[")[0] for item in request.session.items}
    assert {test for tests in MATRIX.values() for test in tests} & collected <= marked
