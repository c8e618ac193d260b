"""A plan as a table for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from vembed_ds.planning.memory import ROWS, Peak
from vembed_ds.planning.parameters import ModelSize
from vembed_ds.planning.recommend import GIB, Advice, Way

COLUMNS = (*ROWS, "total", "host", "sent", "chunk", "recomputing")


@dataclass(frozen=True)
class Line:
    """What one way takes.

    Attributes:
        way: What was planned.
        peak: On a rank's device.
        host: Bytes on the host, of each rank.
        sent: Bytes that a rank sends in a step.
        fits: Whether that is within the memory.
        largest: Items of the largest chunk that fits; ``None``: none does.
        largest_recomputing: The same with activation checkpointing; ``None`` also where that is not
            offered.
    """

    way: Way
    peak: Peak
    host: int
    sent: int
    fits: bool
    largest: int | None
    largest_recomputing: int | None


@dataclass(frozen=True)
class Plan:
    """Everything that was found out.

    Attributes:
        title: Run and machine.
        size: Of the model.
        precision: Of the model.
        width: Dimensions of an embedding.
        batch_size: Pairs of a rank.
        items: Of a rank and step, by stream.
        origin: Where the size of the items is known from.
        memory: Bytes of a device that may be used.
        reserve: Bytes of it that are set aside.
        lines: The ways; the first is the one that is configured, if any is.
        configured: Whether the first one is.
        advice: What to take.
        left_out: What was not counted.
    """

    title: str
    size: ModelSize
    precision: str
    width: int
    batch_size: int
    items: Mapping[str, int]
    origin: str
    memory: int
    reserve: int
    lines: Sequence[Line]
    configured: bool
    advice: Advice
    left_out: Sequence[str]


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values, sizes in bytes."""
    return {
        "model": {
            "parts": [asdict(part) for part in plan.size.parts],
            "parameters": plan.size.total,
            "trained": plan.size.trained,
            "precision": plan.precision,
            "width": plan.width,
        },
        "batch_size": plan.batch_size,
        "items": dict(plan.items),
        "items_from": plan.origin,
        "memory": plan.memory,
        "reserve": plan.reserve,
        "ways": [_line(line) for line in plan.lines],
        "configured": plan.configured,
        "recommended": None if plan.advice.way is None else _way(plan.advice.way),
        "reason": plan.advice.reason,
        "left_out": list(plan.left_out),
    }


def as_text(plan: Plan) -> str:
    """A table, and what to do."""
    return "\n".join(_text(plan)) + "\n"


def _text(plan: Plan) -> Iterator[str]:
    size = plan.size
    yield plan.title
    yield f"  model: {_count(size.total)} parameters, {_count(size.trained)} trained, {plan.precision}"
    for part in size.parts:
        kinds = {"trained": part.trained, "frozen": part.frozen}
        told = [f"{_count(number)} {kind}" for kind, number in kinds.items() if number]
        yield f"    {part.name}: {', '.join(told) or 'no parameters'}"
    items = ", ".join(f"{number} x {stream}" for stream, number in plan.items.items())
    yield f"  a rank's step: {plan.batch_size} pairs, {items} ({plan.origin}), embeddings of {plan.width}"
    first = plan.lines[0].way
    unit = _unit(plan)
    yield ""
    yield (
        f"{unit.name} of a rank at its fullest moment, chunks of {first.chunk_size}"
        f"{', activations computed again' if first.checkpointing else ''}; * configured, ! does not fit"
    )
    yield from _table(plan, unit)
    yield ""
    yield (
        f"fits: at most {plan.memory / GIB:.2f} GiB, that is without {plan.reserve / GIB:.2f} GiB for what is "
        f"not counted: {', '.join(plan.left_out)}"
    )
    yield from _advice(plan.advice)


class _Unit(NamedTuple):
    name: str
    size: int

    def write(self, number: int) -> str:
        return f"{number / self.size:.2f}" if number else "-"


def _unit(plan: Plan) -> _Unit:
    """In which small models are not all zeros."""
    largest = max(line.peak.total for line in plan.lines)
    return _Unit("GiB", GIB) if largest >= GIB else _Unit("MiB", GIB // 1024)


def _table(plan: Plan, unit: _Unit) -> Iterator[str]:
    rows = [["", *COLUMNS]]
    for number, line in enumerate(plan.lines):
        mark = "*" if plan.configured and number == 0 else " "
        cells = [unit.write(line.peak.rows[name]) for name in ROWS]
        total = f"{unit.write(line.peak.total)}{' ' if line.fits else '!'}"
        chunks = [_or_none(line.largest), _or_none(line.largest_recomputing)]
        name = f"{mark} {line.way.setting.name}"
        rows.append([name, *cells, total, unit.write(line.host), unit.write(line.sent), *chunks])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        name, *cells = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([name, *cells]).rstrip()


def _advice(advice: Advice) -> Iterator[str]:
    if advice.way is None:
        yield f"recommended: nothing; {advice.reason}"
        return
    keys = " ".join(f"{key}={value}" for key, value in settings_to_write(advice.way).items())
    yield f"recommended: {keys}"
    yield f"  because {advice.reason}"


def settings_to_write(way: Way) -> dict[str, Any]:
    """The file and the keys that choose a way."""
    setting = way.setting
    file = (
        f"ds_configs/zero{setting.zero_stage}{'_offload' if setting.offload_optimizer else ''}.json"
    )
    found: dict[str, Any] = {
        "--ds_config": file,
        "use_gradient_cache": True,
        "gradient_cache_chunk_size": way.chunk_size,
        "gradient_checkpointing": way.checkpointing,
        "gradient_reduction": setting.reduction,
    }
    if way.checkpointing and setting.reduction == "per_chunk":  # another mechanism is refused
        found["activation_checkpointing"] = "huggingface"
    if setting.zero_stage == 3:
        found["zero3_gather"] = setting.gather
    return {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in found.items()
    }


def _line(line: Line) -> dict[str, Any]:
    return {
        **_way(line.way),
        "phase": line.peak.phase,
        "bytes": dict(line.peak.rows),
        "total": line.peak.total,
        "host": line.host,
        "sent": line.sent,
        "fits": line.fits,
        "largest_chunk": line.largest,
        "largest_chunk_recomputing": line.largest_recomputing,
    }


def _way(way: Way) -> dict[str, Any]:
    return {
        "name": way.setting.name,
        "chunk_size": way.chunk_size,
        "checkpointing": way.checkpointing,
        **asdict(way.setting),
        "write": settings_to_write(way),
    }


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _or_none(number: int | None) -> str:
    return "-" if number is None else str(number)
