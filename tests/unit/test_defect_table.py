"""Every test that a document names exists, and the tables leave nothing out."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from vembed_ds.losses import DISTILLATION_LOSSES, LOSSES
from vembed_ds.models.families import VISION_LANGUAGE

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^\]]+)\])?`")
LATER = {7}  # rows that say what they wait for


def tables(name: str) -> list[list[str]]:
    """The cells of every row of every table, headings left out."""
    found, lines = [], (DOCS / name).read_text().splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|") and above.startswith("|") and not line.startswith("| ---"):
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


@functools.cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


@functools.cache
def words_of(path: str) -> frozenset[str]:
    """Texts in a test file and in what it imports of the tests, where its cases are."""
    words, known, left = set(), {path}, [path]
    while left:
        for node in ast.walk(parsed(left.pop())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                new = {file for file in _files_of(node) if (ROOT / file).is_file()} - known
                known |= new
                left += new
    return frozenset(words)


def _files_of(node: ast.ImportFrom) -> set[str]:
    """The files that `from tests.a import b` may mean: `a.py` or `a/b.py`."""
    folder = str(node.module).replace(".", "/")
    return {f"{folder}.py", *(f"{folder}/{alias.name}.py" for alias in node.names)}


def problem(path: str, test: str, case: str) -> str | None:
    if not (ROOT / path).is_file():
        return f"{path}: no such file"
    functions = {node.name for node in parsed(path).body if isinstance(node, ast.FunctionDef)}
    if test not in functions or not test.startswith("test_"):
        return f"{path}: no test {test}"
    if case and case not in words_of(path):
        return f"{path}: {test} has no case {case}"
    return None


@pytest.mark.parametrize("document", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_test_that_a_document_names_exists(document: str) -> None:
    text = (DOCS / document).read_text()
    named = NAMED.findall(text)
    assert len(named) == text.count(".py::"), "a name that is not written as `path::test[case]`"
    assert [found for name in named if (found := problem(*name))] == []


def test_a_name_that_is_wrong_is_found() -> None:
    here = "tests/unit/test_defect_table.py"
    assert problem(here, "test_a_name_that_is_wrong_is_found", "") is None
    assert problem(here, "test_of_another_name", "") == f"{here}: no test test_of_another_name"
    assert problem("tests/none.py", "test_x", "") == "tests/none.py: no such file"
    families = "tests/parity/test_families.py"
    assert problem(families, "test_family", "dinov2") is None
    assert problem(families, "test_family", "dino" + "v9") is not None


def test_every_defect_has_a_row_and_a_test() -> None:
    rows = [row for row in tables("vembed_defects.md") if len(row) == 4 and row[0].isdigit()]
    assert sorted(int(row[0]) for row in rows) == list(range(1, 47))
    assert {int(row[0]) for row in rows if "ater (" in row[2]} == LATER
    assert all(NAMED.search(row[3]) for row in rows)


def test_every_bad_input_has_a_test() -> None:
    rows = [row for row in tables("vembed_defects.md") if len(row) == 3]
    assert len(rows) > 25
    assert [row[0] for row in rows if not NAMED.search(row[2])] == []


def test_every_family_has_a_test_a_source_and_a_default() -> None:
    rows = [row for row in tables("models.md") if len(row) == 8]
    families = {case for row in rows for _, test, case in NAMED.findall(row[5]) if test}
    assert families == {*_families(), "composed"}
    assert set(VISION_LANGUAGE) <= families
    assert all(row[3] and re.search(r"\d{4}\.\d{4,5}|other rows", row[6]) for row in rows)


def _families() -> set[str]:
    """Names of the families that are tested; `convnext` is the image tower of `composed`."""
    module = parsed("tests/parity/families.py")
    (table,) = (
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAMILIES"
    )
    assert isinstance(table, ast.Dict)
    return {key.value for key in table.keys if isinstance(key, ast.Constant)} - {"convnext"}


def test_every_loss_has_a_formula_a_source_a_default_and_tests() -> None:
    rows, losses = tables("losses.md"), {*LOSSES, *DISTILLATION_LOSSES}
    formulas = [row for row in rows if len(row) == 5]
    assert losses <= {name for row in formulas for name in re.findall(r"`(\w+)`", row[0])}
    assert all(all(row) for row in formulas)
    tested = [row for row in rows if len(row) == 4]
    assert losses <= {name for row in tested for name in re.findall(r"`(\w+)`", row[0])}
    assert [row[0] for row in tested if not all(map(NAMED.search, row[1:3]))] == []
