"""Every message that `docs/troubleshooting.md` quotes stands in the source, word for word."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
OURS, THEIRS = PAGE.split("## From other programs")
QUOTE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
LEAST_LETTERS = 10  # of the longest part that stands as it is; less would be found anywhere


def literals() -> list[str]:
    """Every text of the package as one string, with ``\\0`` for each value of an f-string."""
    found = []
    for path in sorted((ROOT / "vembed_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


LITERALS = literals()


def pattern(quote: str) -> re.Pattern[str]:
    """``...`` stands for anything, at the ends as well."""
    return re.compile(".*".join(map(re.escape, quote.split("..."))), re.DOTALL)


def stands(quote: str) -> bool:
    return any(pattern(quote).search(text) for text in LITERALS)


def test_a_message_that_does_not_stand_is_found() -> None:
    assert stands("unknown key; ...")
    assert not stands("unknown " + "kee; ...")
    assert not stands("... minutes young: a build was killed")


@pytest.mark.parametrize("quote", QUOTE.findall(OURS))
def test_a_quoted_message_stands_in_the_source(quote: str) -> None:
    assert max(map(len, quote.split("..."))) >= LEAST_LETTERS, "says too little to be looked for"
    assert stands(quote)


def test_no_message_is_quoted_twice_and_every_row_has_a_cause_and_a_remedy() -> None:
    quotes = QUOTE.findall(PAGE)
    assert len(quotes) == len(set(quotes)) > 60
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(quotes)
    assert all(len(cells) == 3 and all(cells) for cells in map(_cells, rows))


def test_what_deepspeed_says_is_what_it_says() -> None:
    spec = find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    zero = (Path(spec.origin).parent / "runtime" / "zero" / "stage_1_and_2.py").read_text()
    assert "Gradient computed twice for this partition" in THEIRS
    assert "Gradient computed twice for this partition" in zero


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split(" | ")]
