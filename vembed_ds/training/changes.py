"""What has changed between a checkpoint and the run that goes on from it, and what of it may."""

from __future__ import annotations

import difflib
import json
import logging
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vembed_ds.config.schema import SECTION_OF, default_of
from vembed_ds.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

ALLOW = "--allow_change"

_ZERO = "zero_optimization."

# Parts of DeepSpeed's JSON that decide where things lie and how they travel, not what is computed.
PLACEMENT = (
    "activation_checkpointing.",
    "checkpoint.",
    "optimizer.params.foreach",
    "optimizer.params.fused",
    "optimizer.params.torch_adam",
    "steps_per_print",
    "wall_clock_breakdown",
    "world_size",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    _ZERO,
)

# What of DeepSpeed's JSON follows from keys of ours, which are compared themselves.
_OURS = frozenset(
    [
        "bf16.enabled",
        "communication_data_type",
        "data_types.grad_accum_dtype",
        "fp16.enabled",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.lr",
        "optimizer.params.weight_decay",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ]
)

_PARAMETERS = "the checkpoint holds other parameters"
# No checkpoint can be carried over these.
FIXED = {
    "freeze_image_encoder": _PARAMETERS,
    "freeze_text_encoder": _PARAMETERS,
    "learnable_temperature": _PARAMETERS,
    "load_in_4bit": _PARAMETERS,
    "lora_modules_to_save": _PARAMETERS,
    "lora_r": _PARAMETERS,
    "lora_target_modules": _PARAMETERS,
    "optimizer.type": "the checkpoint holds another optimizer's state",
    "precision": "the checkpoint holds the state of another number format, not compared",
    "projection_dim": _PARAMETERS,
    "projection_layers": _PARAMETERS,
    "use_dora": _PARAMETERS,
    "use_lora": _PARAMETERS,
}

_DIGESTS = "data_fingerprint"  # by data set, in whose order records are numbered
_MOVED = "allow it where it is the same model in another place"
_HINTS = {
    _DIGESTS: "the contents or the order of the records",
    "epochs": "harmless by itself: what counts is num_steps",
    "max_steps": "harmless by itself: what counts is num_steps",
    "global_batch_size": "batch_size x ranks",
    "image_model_name": _MOVED,
    "model_name": _MOVED,
    "num_steps": "follows from epochs or max_steps, the global batch and the data",
    "teacher_model_name": _MOVED,
    "text_model_name": _MOVED,
}

Rule = Literal["free", "named", "fixed"]


@dataclass(frozen=True)
class Change:
    """A setting that is not as it was.

    Attributes:
        key: Its name.
        old: In the checkpoint.
        new: Of this run.
        rule: Whether it may change: always, where it is allowed by name, or never.
    """

    key: str
    old: Any
    new: Any
    rule: Rule

    def __str__(self) -> str:
        old, new = self.old, self.new
        if self.key == _DIGESTS and old == new:  # in another order
            old, new = list(old), list(new)
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            old, new = ({k: v[k] for k in differing if k in v} for v in (old, new))
        return f"{self.key}: {_text(old)} -> {_text(new)}"


def flat_settings(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every setting of a configuration by a name of its own, in types that JSON gives back.

    Args:
        sections: The configuration, dumped for JSON.

    Returns:
        Values by key; of the entries of a list of mappings ``datasets.NAME.key``, by their names
        where they have one.
    """
    settings: dict[str, Any] = {}
    for section in sections.values():
        for key, value in section.items():
            settings.update(
                _entries(key, value) if key in ("datasets", "teachers") else {key: value}
            )
    del settings["batch_size"]  # of a rank; what counts is the global batch
    return settings


def flat_ds_config(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of DeepSpeed's resolved JSON that no key of ours decides, by its dotted name."""
    return {key: value for key, value in _leaves(ds_config) if key not in _OURS}


def find_changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, free: Collection[str]
) -> list[Change]:
    """What differs, in the order of ``now``.

    A key that the checkpoint lacks, because an earlier version wrote it, had its default.

    Args:
        saved: Of the run that wrote the checkpoint.
        now: Of this run.
        free: Keys of the configuration that may always change.
    """
    keys = dict.fromkeys([*now, *saved])
    triples = ((key, _value(saved, key), _value(now, key)) for key in keys)
    return [Change(k, old, new, _rule(k, free)) for k, old, new in triples if _differ(k, old, new)]


def check_changes(
    changes: Sequence[Change], *, allowed: Collection[str], checkpoint: object
) -> None:
    """Refuse what would make this another run, and was not allowed by name.

    Args:
        changes: From :func:`find_changes`.
        allowed: Keys that may change.
        checkpoint: Named in the message.

    Raises:
        CheckpointError: With every change, and what to add for those that are meant.
    """
    fixed = [change for change in changes if change.rule == "fixed"]
    named = [c for c in changes if c.rule == "named" and c.key not in allowed]
    if not fixed and not named:
        return
    shown = describe_changes(changes, allowed=allowed)
    message = [f"{checkpoint}: this is not the run that wrote it:{shown}"]
    if fixed:
        message.append(
            f"put back {', '.join(c.key for c in fixed)}, or begin a new run: convert the checkpoint "
            "(vembed-ds convert) and train from that model, without --resume"
        )
    if named:
        keys = " ".join(shlex.quote(key) for key in sorted({c.key for c in named} | set(allowed)))
        message.append(f"put back what is not meant to change; for what is, add\n  {ALLOW} {keys}")
    raise CheckpointError("\n".join(message))


def describe_changes(changes: Sequence[Change], *, allowed: Collection[str]) -> str:
    """One line for each change; empty when there is none.

    Of ZeRO's settings the stage, devices of offloading, and one that names the others: many follow.
    """
    zero = [
        c.key
        for c in changes
        if c.key.startswith(_ZERO) and c.key.rpartition(".")[2] not in ("stage", "device")
    ]
    told = [c for c in changes if not zero[1:] or c.key not in zero]
    lines = [f"{change}{_remark(change, allowed)}" for change in told]
    if zero[1:]:
        names = ", ".join(key.removeprefix(_ZERO) for key in zero)
        lines.append(f"{_ZERO}*, where things lie: {names} (harmless)")
    return "".join(f"\n  {line}" for line in lines)


def check_allowed(allowed: Collection[str], *, known: Collection[str]) -> None:
    """Refuse names in ``--allow_change`` that no setting has.

    Raises:
        ConfigError: Naming the nearest one.
    """
    problems = []
    for name in allowed:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            remedy = f"did you mean {near[0]}?" if near else "remove it"
            problems.append(f"{ALLOW} {name}: there is no such setting; {remedy}")
    if problems:
        raise ConfigError(problems)


def _entries(key: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, entry in enumerate(entries):
        name = entry.get("name") or place
        found |= {f"{key}.{name}.{leaf}": value for leaf, value in entry.items() if leaf != "name"}
    return found


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(settings: Mapping[str, Any], key: str) -> Any:
    if key in settings or key not in SECTION_OF:
        return settings.get(key)
    return json.loads(json.dumps(default_of(key)))


def _differ(key: str, old: Any, new: Any) -> bool:
    reordered = key == _DIGESTS and isinstance(old, Mapping) and list(old) != list(new)
    return old != new or reordered


def _rule(key: str, free: Collection[str]) -> Rule:
    if key in FIXED:
        return "fixed"
    return "free" if _leaf(key) in free or key.startswith(PLACEMENT) else "named"


def _leaf(key: str) -> str:
    """The key itself, or of an entry in a list of data sets or teachers its last part."""
    prefix = {"datasets": "", "teachers": "teacher_"}.get(key.partition(".")[0])
    return key if prefix is None or "." not in key else prefix + key.rpartition(".")[2]


def _remark(change: Change, allowed: Collection[str]) -> str:
    if change.rule == "fixed":
        return f" (cannot change: {FIXED[change.key]})"
    if change.rule == "free":
        return f" ({_HINTS.get(change.key, 'harmless')})"
    if change.key in allowed:
        return f" (by {ALLOW})"
    hint = _HINTS.get(change.key)
    return f" ({hint})" if hint else ""


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
