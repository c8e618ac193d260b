"""From measurements to a folder: JSON, tables in Markdown, plots."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.options import Options, Result, Row, Workload
from benchmarks.targets import Outcome, judge_targets

PACKAGES = ("torch", "deepspeed", "transformers", "sentence-transformers", "accelerate")
NOTHING = "-"


def table(columns: Mapping[str, tuple[str, str]], rows: Sequence[Row]) -> str:
    """Markdown; who has not passed the gate shows what it computed, and nothing else."""
    names = [name for name in columns if any(row.get(columns[name][0]) is not None for row in rows)]
    lines = [f"| variant | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for row in rows:
        mark = {"wrong": " **WRONG**", "failed": " **failed**"}.get(row["status"], "")
        cells = [_cell(row, *columns[name]) for name in names]
        lines.append(f"| {row['variant']}{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def targets_table(outcomes: Sequence[Outcome]) -> str:
    """Markdown; says of each whether it is reached."""
    lines = ["| target | limit | measured | |", "| --- | ---: | ---: | --- |"]
    words = {None: "not yet measured", True: "reached", False: "**not reached**"}
    for target, figure, reached in outcomes:
        sign = ">=" if target.at_least else "<="
        measured = NOTHING if figure is None else f"{figure:.3g} {target.unit}"
        limit = f"{sign} {target.limit:g} {target.unit}"
        lines.append(
            f"| {target.text} (best peer then: {target.best_peer}) | {limit} | {measured} | {words[reached]} |"
        )
    return "\n".join(lines)


def write_report(
    folder: Path, results: Mapping[str, tuple[Workload, Result]], *, options: Options, load: Any
) -> str:
    """Write everything.

    Args:
        folder: Of the run; made.
        results: By the number of the workload.
        options: The user's.
        load: Of the machine, at the start and at the end.

    Returns:
        The text of ``report.md``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {**circumstances(), "load": load, "rounds": options.rounds, "steps": options.steps}
    about["quick"] = options.quick
    parts = ["# Benchmarks", _about_text(about)]
    found: dict[str, Any] = {}
    for number, (workload, result) in results.items():
        outcomes = [] if options.quick else judge_targets(number, result.rows)
        parts += [f"## {number}: {workload.title}", table(result.columns, result.rows)]
        if result.notes:
            parts.append("\n".join(f"* {note}" for note in result.notes))
        if outcomes:
            parts.append(targets_table(outcomes))
        if plot(workload, result, folder / f"{number}.png"):
            parts.append(f"![{workload.title}]({number}.png)")
        found[number] = {
            "title": workload.title,
            "rows": result.rows,
            "notes": result.notes,
            "targets": [
                {
                    "text": o.target.text,
                    "limit": o.target.limit,
                    "figure": o.figure,
                    "reached": o.reached,
                }
                for o in outcomes
            ],
            "raw": result.raw,
        }
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text)
    content = json.dumps({"about": about, "workloads": found}, indent=1, default=str)
    (folder / "results.json").write_text(content)
    return text


def circumstances() -> dict[str, Any]:
    """When, on what kind of machine, with which versions; no names."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def plot(workload: Workload, result: Result, file: Path) -> bool:
    """One point for each variant that was measured; ``False``: nothing to plot, or no matplotlib."""
    keys = workload.plotted
    points = [row for row in result.rows if keys and all(row.get(key) is not None for key in keys)]
    if not points:
        return False
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    titles = {key: title for title, (key, _) in result.columns.items()}
    series: dict[str, list[Row]] = {}
    for row in points:
        series.setdefault(row["variant"], []).append(row)
    colours = mpl.colormaps["tab20"]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for number, (name, own) in enumerate(series.items()):
        mark = "o-" if own[0]["peer"] == "ours" else "s:"
        across, upwards = ([row[key] for row in own] for key in keys)
        axes.plot(across, upwards, mark, label=name, color=colours(number % 20))
    across, upwards = (titles.get(key, key) for key in keys)
    axes.set(xlabel=across, ylabel=upwards, title=workload.title, xlim=(0, None), ylim=(0, None))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


def _cell(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    return NOTHING if value is None else form.format(value)


def _about_text(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    lines = [
        f"{about['date']}, {about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, "
        f"{about['system']}, Python {about['python']}, {versions}; commit {about['commit']}.",
        f"{about['rounds']} rounds of {about['steps']} timed steps; load of the machine "
        f"{about['load'][0]:.1f} at the start, {about['load'][1]:.1f} at the end.",
    ]
    if about["quick"]:
        lines.append("**Quick: sizes that only show that everything runs.**")
    return "\n".join(lines)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NOTHING


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip() or NOTHING
