"""Docstring-to-code pairs from Python's own standard library, split by module.

``python examples/docstrings/prepare.py data/docstrings`` writes ``train.jsonl`` and ``val.jsonl``.
Every fifth module is held out: its functions are never seen in training.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_WORDS = 4
MAX_CHARACTERS = 1500
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_EVERY = 5


def main(target: str) -> None:
    """Write the two files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows: dict[str, list[dict[str, str]]] = {"train": [], "val": []}
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if SKIPPED.isdisjoint(module.parts):
            split = "val" if _held_out(module.parts[0]) else "train"
            for query, positive in _pairs(path):
                if query not in seen and positive not in seen:
                    seen |= {query, positive}
                    rows[split].append({"query": query, "positive": positive})
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(found)} pairs")


def _held_out(name: str) -> bool:
    """A module or package as a whole, by its name: the same on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_EVERY == 0


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The first paragraph of every function's docstring, and its code without the docstring."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or len(node.body) < 2:
            continue
        summary = " ".join(docstring.split("\n\n")[0].split())
        node.body = node.body[1:]
        node.name = "f"  # the name would give the answer away
        if len(summary.split()) >= MIN_WORDS:
            yield summary[:MAX_CHARACTERS], ast.unparse(node)[:MAX_CHARACTERS]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data/docstrings")
