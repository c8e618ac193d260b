"""The direction of knowledge: which package may import which, and no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent / "vembed_ds"

# Leaves that everybody may import, besides a package's own modules.
LEAVES = {"durable", "errors", "references", "run_lock", "similarity", "streams", "tracker_names"}
ALLOWED: dict[str, set[str]] = {
    "distributed": set(),
    "config": set(),
    "models": set(),
    "tracking": set(),
    "data": {"distributed"},
    "losses": {"distributed"},
    "engine": {"distributed"},
    "steps": {"distributed", "data"},
    "checkpointing": {"distributed", "engine", "data", "inference", "models"},
    "evaluation": {"distributed", "data", "models"},
    "inference": {"data", "models"},
    "sentence_transformers_module": {"data", "inference"},
    "mteb_model": {"data", "inference"},
    "command": {"config", "distributed"},
    "cli": {"command", "distributed", "launching", "preflight"},
    "__main__": {"cli"},
    "launching": {"distributed"},
    "preflight": {"distributed", "engine", "launching"},
    "encoding": {"distributed", "data", "inference", "teachers"},
    "mining": {"distributed", "data", "encoding", "evaluation", "inference"},
    "api": {
        "command",
        "config",
        "distributed",
        "data",
        "engine",
        "checkpointing",
        "inference",
        "training",
    },
    "planning": {"distributed", "data", "models", "engine", "steps"},
    "teachers": {"distributed", "data", "checkpointing", "engine", "inference", "models"},
    "training": {
        "config",
        "distributed",
        "data",
        "models",
        "losses",
        "engine",
        "steps",
        "checkpointing",
        "evaluation",
        "inference",
        "planning",
        "teachers",
        "tracking",
    },
}
COMMANDS = {
    "train",
    "convert",
    "doctor",
    "encode",
    "evaluate",
    "mine",
    "plan",
    "validate",
    "precompute_teacher",
}  # import everything, are imported by nothing
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Dotted names below ``vembed_ds`` that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    prefix = "vembed_ds."
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def test_the_walk_finds_files_and_imports() -> None:
    assert Path("steps/gradient_cache.py") in FILES
    assert "data.batches" in imported_modules(ROOT / "steps" / "gradient_cache.py")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_import_goes_in_the_permitted_direction(file: Path) -> None:
    package = file.parts[0].removesuffix(".py")
    imported = {name.split(".")[0] for name in imported_modules(ROOT / file)}
    assert not imported & COMMANDS, "commands are never imported"
    if package in COMMANDS or package == "__init__":
        return
    allowed = LEAVES | ALLOWED.get(package, set()) | {package}
    assert imported <= allowed, f"{file} must not import {sorted(imported - allowed)}"


def test_only_the_engine_and_what_composes_it_know_deepspeed() -> None:
    knows = {file.parts[0] for file in FILES if "deepspeed" in _top_level_names(ROOT / file)}
    assert knows <= {"engine", "checkpointing", "training", "preflight", "api", "command.py"}


def test_no_cycles_between_modules() -> None:
    modules = {".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in FILES}
    graph = {
        module: {name for name in imported_modules(_path(module)) if name in modules - {module}}
        for module in modules
    }
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in graph[module]:
                visit(name, [*path, module])
            done.add(module)

    for module in modules:
        visit(module, [])


def _path(module: str) -> Path:
    base = ROOT / Path(*module.split(".")) if module != "__init__" else ROOT / "__init__"
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _top_level_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names
