"""From what the ranks measured to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

ALONE = "no teacher"
TOLERANCE = 1e-5

Round = Mapping[str, Sequence[Mapping[str, Any]]]  # by variant: what each rank measured

COLUMNS = {
    "CPU s": "{cpu_seconds:.2f}",
    "ratio": "{ratio:.2f}",
    "wall s": "{seconds:.2f}",
    "forwards": "{forwards:g}",
    "predicted MB": "{predicted_mb:.2f}",
    "counted MB": "{counted_mb:.2f}",
    "wire MB": "{wire_mb:.2f}",
    "teacher MB": "{resident_mb:.1f}",
    "peak MB": "{peak_mb:.0f}",
}


def summarize(
    name: str,
    rounds: Sequence[Round],
    *,
    expected: Mapping[str, float],
    predicted_bytes: float,
) -> dict[str, Any]:
    """Medians over the rounds, of a rank and step; bytes beyond those without a teacher.

    Args:
        name: The variant.
        rounds: All of them.
        expected: ``loss`` and ``grad_norm`` of the first step in plain PyTorch.
        predicted_bytes: Of a step, for the sake of its teachers.
    """
    own = [found[name] for found in rounds]
    cpu = [_cpu_seconds(ranks) for ranks in own]
    alone = [_cpu_seconds(found[ALONE]) for found in rounds]
    wire = [_wire_bytes(ranks) for ranks in own]
    base = [_wire_bytes(found[ALONE]) for found in rounds]
    return {
        "variant": name,
        "loss": own[0][0]["loss"],
        "grad_norm": own[0][0]["grad_norm"],
        "error": max(abs(r[key] / expected[key] - 1) for f in own for r in f for key in expected),
        "cpu_seconds": median(cpu),
        "ratio": median(mine / other for mine, other in zip(cpu, alone, strict=True)),
        "seconds": median(step["seconds"] for ranks in own for r in ranks for step in r["steps"]),
        "forwards": median(step["forwards"] for ranks in own for r in ranks for step in r["steps"]),
        "predicted_mb": predicted_bytes / 1e6,
        "counted_mb": (_counted_bytes(own[0]) - _counted_bytes(rounds[0][ALONE])) / 1e6,
        "wire_mb": median(m - o for m, o in zip(wire, base, strict=True)) / 1e6,
        "resident_mb": max(sum(t["shard"] * 4 for t in r["resident"]) for r in own[0]) / 1e6,
        "peak_mb": median(max(r["peak_mb"] for r in ranks) for ranks in own),
        "preparation_seconds": median(mean(r["preparation_seconds"] for r in f) for f in own),
        "preparation_forwards": own[0][0]["preparation_forwards"],
        "cache_mb": own[0][0]["cache_bytes"] / 1e6,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; nothing but the gate of a variant that computes something else."""
    lines = [
        f"| variant | {' | '.join(COLUMNS)} | loss, gradient norm | error |",
        f"| --- |{' ---: |' * len(COLUMNS)} --- | ---: |",
    ]
    for row in rows:
        right = row["error"] <= TOLERANCE
        cells = [form.format(**row) if right else "-" for form in COLUMNS.values()]
        cells = ["-" if cell == "nan" else cell for cell in cells]
        gate = f"{row['loss']:.6f}, {row['grad_norm']:.6f}{'' if right else ' WRONG'}"
        lines.append(f"| {row['variant']} | {' | '.join(cells)} | {gate} | {row['error']:.0e} |")
    prepared = [row for row in rows if row["preparation_forwards"]]
    lines += [
        f"\n{row['variant']}, once before the first step: {row['preparation_seconds']:.1f} CPU seconds "
        f"and {row['preparation_forwards']} forward passes per rank, {row['cache_mb']:.1f} MB on the disk"
        for row in prepared
    ]
    return "\n".join(lines)


def _cpu_seconds(ranks: Sequence[Mapping[str, Any]]) -> float:
    return float(mean(median(step["cpu_seconds"] for step in rank["steps"]) for rank in ranks))


def _counted_bytes(ranks: Sequence[Mapping[str, Any]]) -> float:
    return float(mean(sum(rank["counted_bytes"].values()) for rank in ranks))


def _wire_bytes(ranks: Sequence[Mapping[str, Any]]) -> float:
    """Of a rank and step; NaN: nobody knows."""
    found = ranks[0]["wire_bytes"]
    return float("nan") if found is None else found / len(ranks[0]["steps"]) / len(ranks)
