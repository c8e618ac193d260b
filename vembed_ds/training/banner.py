"""What a run says of itself before its first step: pure text from plain facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH = 78
GIB = 2**30
_LABEL = 12


@dataclass(frozen=True)
class PartFacts:
    """A part of the model: its name, and how many values of it are trained and frozen."""

    name: str
    trained: int
    frozen: int


@dataclass(frozen=True)
class StartFacts:
    """A run that begins, or would.

    What is only known with the model and its engine has a default: "not known", which is not shown.

    Attributes:
        version: Of this package.
        output_dir: Of the run.
        run_name: ``None``: it has none.
        resumed: Checkpoint that it goes on from; ``None``: it is fresh.
        step: Optimizer steps done.
        num_steps: Of the whole run.
        steps_per_epoch: ``None``: a stream.
        models: What the weights start from.
        precision: Number format.
        zero_stage: DeepSpeed's.
        world_size: Ranks.
        machines: That they are on.
        device: Kind, or name, of a rank's device.
        batch_size: Pairs of a rank.
        chunks: How a batch is cut, in words.
        loss: In words.
        teachers: Names.
        data: Name and number of records of every data set; ``None``: a stream.
        validation: The same of what is evaluated.
        schedule: Learning rate, in words.
        saving: When checkpoints are written, in words.
        evaluating: When it is evaluated, in words.
        trackers: Names.
        parts: Of the model.
        width: Dimensions of an embedding.
        gather: When ZeRO-3 gathers parameters, in words; empty below it, too.
        reduction: When gradients are reduced, in words.
        offload: What lies on the host, in words; empty: nothing.
        state_bytes: Of a rank's model, gradients and optimizer, as planned.
    """

    version: str
    output_dir: str
    run_name: str | None
    resumed: str | None
    step: int
    num_steps: int
    steps_per_epoch: int | None
    models: str
    precision: str
    zero_stage: int
    world_size: int
    machines: int
    device: str
    batch_size: int
    chunks: str
    loss: str
    teachers: Sequence[str]
    data: Sequence[tuple[str, int | None]]
    validation: Sequence[tuple[str, int | None]]
    schedule: str
    saving: str
    evaluating: str
    trackers: Sequence[str]
    parts: Sequence[PartFacts] = ()
    width: int | None = None
    gather: str = ""
    reduction: str = ""
    offload: str = ""
    state_bytes: int | None = None


def banner(facts: StartFacts, *, note: str = "") -> str:
    """At most 25 lines, unless there are many data sets.

    Args:
        facts: Of the run.
        note: Beside the headline.
    """
    rows = [headline(f"vembed_ds {facts.version}{note}")]
    rows += [row for label, lines in _rows(facts) for row in labelled(label, lines)]
    return "\n".join([*rows, "-" * WIDTH])


def headline(text: str) -> str:
    """``---- text ----``, as wide as all of it."""
    return f"---- {text} ".ljust(WIDTH, "-")


def labelled(label: str, lines: Sequence[str]) -> Iterator[str]:
    """Lines beside a label; the lines behind the first stand below it."""
    for number, line in enumerate(lines):
        yield f"{'' if number else label:<{_LABEL}}{line}"


def count(number: int) -> str:
    """``151.3 M``, ``12,345``."""
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def of_memory(number: float) -> str:
    """``12.3 GiB``, ``480 MiB``."""
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:,.0f} MiB"


def counted(number: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rows(facts: StartFacts) -> Iterator[tuple[str, list[str]]]:
    name = f"{facts.run_name}, in " if facts.run_name else ""
    yield "run", [f"{name}{facts.output_dir}"]
    if facts.resumed is not None:
        yield "resumed", [f"{facts.resumed}, step {facts.step:,} of {facts.num_steps:,}"]
    width = "" if facts.width is None else f", embeddings of {facts.width}"
    yield "model", [f"{facts.models}{width}", *_parts(facts.parts)]
    yield "data", [_sized(*one) for one in facts.data]
    yield "validation", [_sized(*one) for one in facts.validation] or ["none: nothing is evaluated"]
    yield "loss", [facts.loss]
    if facts.teachers:
        yield "teachers", [", ".join(facts.teachers)]
    every = facts.batch_size * facts.world_size
    ranks = counted(facts.world_size, "rank")
    each = f": {facts.batch_size:,} on each of {ranks}" if facts.world_size > 1 else ""
    yield "batch", [f"{every:,} pairs a step{each}"]
    yield "chunks", [facts.chunks]
    yield "steps", [f"{facts.num_steps:,}{_epochs(facts)}", facts.schedule]
    yield "DeepSpeed", _deepspeed(facts)
    yield "devices", [f"{ranks} on {counted(facts.machines, 'machine')}, {facts.device}"]
    if facts.state_bytes is not None:
        memory = of_memory(facts.state_bytes)
        yield "memory", [f"{memory} a rank for model, gradients and optimizer, without chunks"]
    yield "evaluation", [facts.evaluating]
    yield "checkpoints", [facts.saving]
    yield "trackers", [", ".join(("metrics.jsonl", "metrics.csv", *facts.trackers))]


def _parts(parts: Sequence[PartFacts]) -> list[str]:
    """A table: name, trained, frozen; and what both are of all, where there are several."""
    several = [part for part in parts if part.trained or part.frozen]
    if len(several) > 1:
        trained, frozen = (sum(getattr(p, of) for p in several) for of in ("trained", "frozen"))
        several.append(PartFacts("together", trained, frozen))
    wide = max((len(part.name) for part in several), default=0)
    return [
        f"  {part.name:<{wide}}  {_cell(part.trained, 'trained')}  {_cell(part.frozen, 'frozen')}".rstrip()
        for part in several
    ]


def _cell(number: int, word: str) -> str:
    return f"{count(number):>10} {word}" if number else " " * (11 + len(word))


def _sized(name: str, records: int | None) -> str:
    return f"{name}: " + ("a stream" if records is None else counted(records, "pair"))


def _epochs(facts: StartFacts) -> str:
    per_epoch = facts.steps_per_epoch
    if not per_epoch:
        return ""
    return f", {facts.num_steps / per_epoch:.3g} epochs of {per_epoch:,}"


def _deepspeed(facts: StartFacts) -> list[str]:
    first = [f"ZeRO stage {facts.zero_stage}", facts.precision, facts.offload]
    second = [
        f"gradients reduced {facts.reduction}" if facts.reduction else "",
        f"parameters gathered {facts.gather}" if facts.gather else "",
    ]
    lines = [", ".join(filter(None, line)) for line in (first, second)]
    return [line for line in lines if line]
