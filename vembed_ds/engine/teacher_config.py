"""The DeepSpeed JSON of a teacher: ZeRO-3 without an optimizer, and nothing that would train it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from vembed_ds.engine.ds_config import HPZ, NEVER_PRINT, hpz_problems
from vembed_ds.engine.ds_keys import as_json, has_key, key_problems, shape_problems, value_at
from vembed_ds.errors import ConfigError

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_TRAINING = ("optimizer", "scheduler", "gradient_clipping", "zero_optimization.offload_optimizer")

# A rank holds its shard and the module that runs. DeepSpeed's own defaults keep small parameters
# whole and gather 50 million elements ahead; both may be set again, for speed.
_LEAN = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}


def resolve_teacher_config(
    raw: Mapping[str, Any] | None,
    *,
    origin: str,
    precision: str,
    world_size: int,
    device_type: str,
    fp16_supported: bool,
    bf16_supported: bool,
) -> dict[str, Any]:
    """Fill every ``"auto"``, and refuse what does not fit a frozen model.

    Args:
        raw: The JSON's content, not changed; ``None``: that of ``ds_configs/teacher_zero3.json``.
        origin: The JSON's name, for messages.
        precision: ``fp32``, ``bf16`` or ``fp16``: of the teacher's weights.
        world_size: Number of ranks that share them.
        device_type: ``cpu`` or ``cuda``.
        fp16_supported: Whether that device computes in fp16.
        bf16_supported: Whether that device computes in bf16.

    Returns:
        A new dict for :func:`deepspeed.initialize`.

    Raises:
        ConfigError: Listing every unknown, refused or contradicting key.
    """
    config = copy.deepcopy(dict(raw or {}))
    problems = list(shape_problems(config, origin))
    if problems:  # the rules below rely on the shape of the sections
        raise ConfigError(problems)
    supported = {"fp32": True, "fp16": fp16_supported, "bf16": bf16_supported}
    problems += _training(config, origin)
    problems += _batch(config, origin, world_size)
    problems += _sharding(config, origin, world_size)
    problems += _places(config["zero_optimization"], origin)
    problems += _precision(config, origin, precision)
    if not supported[precision]:
        problems.append(
            f"teacher_precision={precision}: not supported on device type {device_type}; "
            "set teacher_precision: fp32"
        )
    if problems:
        raise ConfigError(problems)
    return {**config, "steps_per_print": NEVER_PRINT, "wall_clock_breakdown": False}


def _training(config: dict[str, Any], origin: str) -> Iterator[str]:
    """Take out what only training has, so that the rules for training's keys do not judge it."""
    for path in _TRAINING:
        value = value_at(config, path)
        if has_key(config, path) and value not in (None, "auto", {"device": "none"}):
            yield (
                f"{path} ({origin}): refused, a teacher is frozen and has no optimizer; remove it"
            )
        parent, _, key = path.rpartition(".")
        (value_at(config, parent) or {} if parent else config).pop(key, None)


def _batch(config: dict[str, Any], origin: str, world_size: int) -> Iterator[str]:
    """DeepSpeed asks for the batch triple; nothing depends on it without an optimizer."""
    for key, value in zip(_BATCH, (world_size, 1, 1), strict=True):
        if config.get(key, "auto") != "auto":
            yield (
                f"{key}={as_json(config[key])} ({origin}): a teacher has no batch of its own; "
                'set "auto"'
            )
        config[key] = value


def _sharding(config: dict[str, Any], origin: str, world_size: int) -> Iterator[str]:
    """The stage and hpZ; for the other keys training's rules hold."""
    zero = config.setdefault("zero_optimization", {})
    if zero.setdefault("stage", 3) != 3:
        yield (
            f"zero_optimization.stage={as_json(zero['stage'])} ({origin}): a teacher is sharded at "
            "stage 3; set 3, or remove it"
        )
    yield from key_problems(config, origin)
    yield from hpz_problems(zero, origin, world_size)
    if zero.get(HPZ) == 1:
        del zero[HPZ]


def _places(zero: dict[str, Any], origin: str) -> Iterator[str]:
    """Where shards are kept, and how much is whole at one time."""
    device = value_at(zero, "offload_param.device")
    if device not in (None, "none", "cpu"):
        yield (
            f"zero_optimization.offload_param.device={as_json(device)} ({origin}): not proven in "
            'this version; set "cpu" or "none"'
        )
    if zero.get("memory_efficient_linear"):
        yield (
            f"zero_optimization.memory_efficient_linear=true ({origin}): replaces the linear layer "
            "of the whole process, the student's too; remove it"
        )
    zero["memory_efficient_linear"] = False
    for key, value in _LEAN.items():
        if zero.get(key, "auto") == "auto":
            zero[key] = value


def _precision(config: dict[str, Any], origin: str, precision: str) -> Iterator[str]:
    for name in ("bf16", "fp16"):
        section = config.setdefault(name, {})
        if section.get("enabled", "auto") not in ("auto", name == precision):
            yield (
                f"{name}.enabled={as_json(section['enabled'])} ({origin}) contradicts "
                f'teacher_precision={precision}; set "auto"'
            )
        section["enabled"] = name == precision
