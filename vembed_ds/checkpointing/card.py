"""``README.md`` of a converted model: what it is, what trained it, how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from vembed_ds.checkpointing.files import FACTS_FILE
from vembed_ds.checkpointing.snippets import loading_snippets
from vembed_ds.errors import CheckpointError, counted

CARD_FILE = "README.md"
METRICS_FILE = "metrics.jsonl"
_MISSING = "not recorded"


@dataclass(frozen=True)
class Evaluation:
    """Metrics that a run logged at one step."""

    step: int
    metrics: Mapping[str, float]


def write_card(
    folder: Path,
    *,
    name: str,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    adapter: bool,
) -> None:
    """Write the model card of a folder that holds everything else.

    Args:
        folder: Of the model.
        name: What the folder will be called.
        settings: Content of ``vembed_config.json``.
        facts: From :func:`read_facts`.
        evaluations: From :func:`read_evaluations`.
        adapter: Whether it holds an adapter instead of weights.
    """
    data = _front_matter(folder, settings, facts, adapter=adapter)
    sections = [
        f"# {name}",
        _introduction(settings, facts, adapter=adapter),
        "## Loading",
        *loading_snippets(folder, name=name, settings=settings, adapter=adapter),
        "## Training",
        _table(("", ""), _training_rows(settings, facts)),
        "## Evaluation",
        _evaluation(evaluations),
        "## License",
        "To be filled in, here and as `license` at the top of this file; what the base model's "
        "license asks for applies.",
    ]
    body = "\n\n".join(sections)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(folder / CARD_FILE)


def read_facts(description: Path) -> dict[str, Any]:
    """What the run noted about itself; empty: nothing.

    Args:
        description: ``<checkpoint>/model``.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = description / FACTS_FILE
    if not path.is_file():
        return {}
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    return facts


def read_evaluations(checkpoint: Path, *, last_step: int | None) -> list[Evaluation]:
    """The first and the last evaluation until the checkpoint, of the run that it lies in.

    Args:
        checkpoint: Folder; ``metrics.jsonl`` lies beside it, or there is nothing to tell.
        last_step: Of the checkpoint; ``None``: unknown, so that nothing is told.
    """
    path = checkpoint.parent / METRICS_FILE
    if last_step is None or not path.is_file():
        return []
    found = [e for e in _evaluations(path) if e.step <= last_step]
    return found[:1] + found[-1:] if len(found) > 1 else found


def _evaluations(path: Path) -> Iterator[Evaluation]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the last line of a run that is still writing
        metrics = {
            name.removeprefix("eval/"): float(value)
            for name, value in values.items()
            if name.startswith("eval/") and isinstance(value, int | float)
        }
        if metrics:
            yield Evaluation(step, metrics)


def _front_matter(
    folder: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], *, adapter: bool
) -> ModelCardData:
    library = "peft" if adapter else "transformers"
    if (folder / "modules.json").is_file():
        library = "sentence-transformers"
    streams = list(settings.get("streams", ()))
    tags = ["vembed_ds", "embeddings", "feature-extraction", *streams]
    bases = [name for name in facts.get("base_models", {}).values() if _on_hub(name)]
    return ModelCardData(
        library_name=library,
        pipeline_tag=_task(streams, settings),
        tags=tags,
        base_model=(bases[0] if len(bases) == 1 else bases) or None,
    )


def _task(streams: Sequence[str], settings: Mapping[str, Any]) -> str:
    if streams == ["text"]:
        return "sentence-similarity"
    if streams == ["image"]:
        return "image-feature-extraction"
    late = "none" in settings.get("pooling", {}).values()
    return "visual-document-retrieval" if late else "feature-extraction"


def _on_hub(name: str | None) -> bool:
    """Whether a name of a base model means something to others."""
    return name is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def _introduction(settings: Mapping[str, Any], facts: Mapping[str, Any], *, adapter: bool) -> str:
    kinds = " and ".join({"text": "texts", "image": "images"}[s] for s in settings["streams"])
    late = "none" in settings.get("pooling", {}).values()
    gives = "one vector per token (late interaction, compared by MaxSim)" if late else "one vector"
    width = settings.get("projection_dim")
    size = f" of {width} numbers" if width else ""
    what = "Adapters (LoRA) of an embedding model" if adapter else "An embedding model"
    mrl = settings.get("mrl_dims")
    shorter = (
        f" Its first {', '.join(map(str, mrl))} numbers were trained to stand alone." if mrl else ""
    )
    return (
        f"{what} for {kinds}, trained with vembed_ds: {gives}{size} for each.{shorter} Base model: "
        f"{_bases(facts)}."
    )


def _bases(facts: Mapping[str, Any]) -> str:
    names: Mapping[str, str | None] = facts.get("base_models", {})
    shown = [f"`{name}`" if name else "random weights" for name in names.values()]
    return " and ".join(shown) or _MISSING


def _training_rows(
    settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    def known(name: str) -> str:
        value = facts.get(name)
        if isinstance(value, Mapping):  # of several data sets
            return ", ".join(f"{key} {of}" for key, of in value.items())
        return _MISSING if value is None else str(value)

    yield "Base model", _bases(facts)
    for entry in facts.get("data", ()):
        yield "Training data", f"`{entry}`"
    yield "Training pairs", known("num_records")
    yield "Fingerprint of the data", known("data_fingerprint")
    yield "Loss", str(facts.get("loss") or settings.get("loss_type") or _MISSING)
    yield "Steps", f"{known('step')} of {known('num_steps')}"
    yield "Global batch", f"{known('global_batch')} pairs on {_place(facts)}"
    for part in facts.get("earlier_parts", ()):
        yield f"Until step {part['until_step']}", f"on {_place(part)}"
    yield "Precision", str(settings.get("precision") or _MISSING)
    yield "Learning rate", f"{known('learning_rate')} ({known('schedule')})"
    yield "Weight decay", known("weight_decay")
    if facts.get("lora"):
        yield "Adapters", str(facts["lora"])
    yield "Longest text", f"{settings.get('max_seq_length')} tokens"
    yield "Weights here", str(settings.get("dtype"))
    versions: Mapping[str, str] = facts.get("versions", {})
    yield "Versions", ", ".join(f"{n} {v}" for n, v in versions.items()) or _MISSING


def _place(facts: Mapping[str, Any]) -> str:
    ranks = facts.get("world_size")
    return (
        f"{_MISSING if ranks is None else counted(ranks, 'rank')}, ZeRO stage "
        f"{facts.get('zero_stage', _MISSING)}"
    )


def _evaluation(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return "No evaluation was found beside the checkpoint."
    first, last = evaluations[0], evaluations[-1]
    head = "before training" if first.step == 0 else f"step {first.step}"
    names = sorted(last.metrics)
    if first is last:
        return _table(("", head), ((n, _number(n, last.metrics[n])) for n in names))
    rows = ((n, _number(n, first.metrics.get(n)), _number(n, last.metrics[n])) for n in names)
    return _table(("", head, f"step {last.step}"), rows)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if name.rpartition("/")[2].startswith("num_") else f"{value:.4f}"


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
