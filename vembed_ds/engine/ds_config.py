"""The DeepSpeed JSON: every ``"auto"`` filled from our configuration, every contradiction named.

DeepSpeed reads a key that it does not know, or that contradicts another, mostly without a word,
and clips at 1.0 when ``gradient_clipping`` is absent. So the dict handed to it is complete, and
what is not proven to give the exact gradient is refused here by name.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed_ds.engine.ds_keys import (
    PROVEN_OPTIMIZERS,
    as_json,
    key_problems,
    optimizer_type,
    shape_problems,
    value_at,
)
from vembed_ds.errors import ConfigError

NEVER_PRINT = 10**12
"""``steps_per_print`` when the JSON has none: our own logger reports the steps."""

HPZ = "zero_hpz_partition_size"
"""Ranks that hold a copy of the parameters between them, for gathers within a machine (ZeRO++)."""

_SIZED_BY_HF = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)


@dataclass(frozen=True)
class _Ours:
    """The values that our own configuration decides, and where they came from."""

    origin: str
    origins: Mapping[str, str]
    world_size: int
    batch_size: int
    precision: str
    gradient_reduction: str
    max_grad_norm: float
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    device_type: str

    def place(self, key: str) -> str:
        """Where the value of ``key`` (or of two, joined by "and") came from."""
        found = dict.fromkeys(self.origins.get(name, "default") for name in key.split(" and "))
        return ", ".join(found)


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        ConfigError: When the file is missing, unreadable, not a JSON object, or has a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_unique_keys)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such DeepSpeed config file; check the path") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} line {error.lineno}: not readable as JSON: {error.msg}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the DeepSpeed config cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands there twice; keep one")
    return values


def resolve_ds_config(
    raw: Mapping[str, Any],
    *,
    origin: str,
    origins: Mapping[str, str],
    world_size: int,
    batch_size: int,
    precision: str,
    max_grad_norm: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    device_type: str,
    fp16_supported: bool,
    bf16_supported: bool,
    gradient_reduction: str = "once",
) -> dict[str, Any]:
    """Fill every ``"auto"``, write what DeepSpeed would default, and refuse contradictions.

    ``"auto"`` for reduce_bucket_size, stage3_prefetch_bucket_size and
    stage3_param_persistence_threshold, which Hugging Face's integration fills from the hidden
    size, removes the key: DeepSpeed's documented default applies.

    Args:
        raw: The JSON's content; not changed.
        origin: The JSON's name, for messages.
        origins: Where our own settings came from, by key; a missing one has its default.
        world_size: Number of data-parallel ranks.
        batch_size: Pairs per rank and step.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        max_grad_norm: Gradient norm to clip to; 0 is off.
        lr: Highest learning rate.
        betas: Adam's decay rates.
        eps: Adam's denominator term.
        weight_decay: Decay of matrices.
        device_type: ``cpu`` or ``cuda``: where the model is trained.
        fp16_supported: Whether that device computes in fp16.
        bf16_supported: Whether that device computes in bf16.
        gradient_reduction: ``once``, ``per_chunk`` or ``auto``.

    Returns:
        A new dict in which nothing is left to chance.

    Raises:
        ConfigError: Listing every unknown, refused or contradicting key.
    """
    ours = _Ours(
        origin, origins, world_size, batch_size, precision, gradient_reduction, max_grad_norm, lr, betas,
        eps, weight_decay, device_type,
    )  # fmt: skip
    config = copy.deepcopy(dict(raw))
    problems = list(shape_problems(config, origin))
    if problems:  # the rules below rely on the shape of the sections
        raise ConfigError(problems)
    supported = {"fp32": True, "fp16": fp16_supported, "bf16": bf16_supported}
    problems += key_problems(config, origin)
    problems += _zero(config, ours)
    problems += _batch(config, ours)
    problems += _clipping(config, ours)
    problems += _precision(config, ours, supported[precision])
    problems += _optimizer(config, ours)
    config.setdefault("steps_per_print", NEVER_PRINT)
    config.setdefault("wall_clock_breakdown", False)
    problems += [
        f'{path}="auto" ({origin}): nothing in the YAML decides it; give a value or remove it'
        for path in _autos(config)
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def _zero(config: dict[str, Any], ours: _Ours) -> Iterator[str]:
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage={as_json(stage)} ({ours.origin}): expected 0, 1, 2 or 3"
        return
    if ours.gradient_reduction == "per_chunk" and stage < 2:
        yield (
            f"gradient_reduction=per_chunk ({ours.place('gradient_reduction')}): at "
            f"zero_optimization.stage={stage} ({ours.origin}) every rank keeps whole gradients in any "
            "case, so it would only cost traffic; use stage 2 or 3, or gradient_reduction: once"
        )
    for key in _SIZED_BY_HF:
        if zero.get(key) == "auto":
            del zero[key]
    yield from hpz_problems(zero, ours.origin, ours.world_size)
    if zero.get(HPZ, 1) != 1 and stage != 3:
        yield (
            f"zero_optimization.{HPZ}={as_json(zero[HPZ])} ({ours.origin}): needs stage 3, not "
            f"{stage}; remove it"
        )
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = value_at(zero, f"{key}.device")
        path = f"zero_optimization.{key}.device={as_json(device)} ({ours.origin})"
        if device not in (None, "none", "cpu"):
            yield f'{path}: only "cpu" and "none" are supported in this version'
        elif device == "cpu" and stage < lowest:
            yield f"{path}: needs stage {lowest} or above, not {stage}; raise stage or remove it"


def hpz_problems(zero: Mapping[str, Any], origin: str, world_size: int) -> Iterator[str]:
    """A number of ranks per machine that is none."""
    ranks = zero.get(HPZ, 1)
    if type(ranks) is not int or ranks < 1 or world_size % ranks:
        yield (
            f"zero_optimization.{HPZ}={as_json(ranks)} ({origin}): must divide the {world_size} "
            "ranks; set the number of ranks of one machine"
        )


def _batch(config: dict[str, Any], ours: _Ours) -> Iterator[str]:
    """Fill the batch triple; DeepSpeed asserts train = micro x accumulation x ranks."""
    train = ours.batch_size * ours.world_size
    accumulation = config.get("gradient_accumulation_steps", "auto")
    if accumulation not in ("auto", 1):
        yield (
            f"gradient_accumulation_steps={as_json(accumulation)} ({ours.origin}): only 1 is "
            "supported, because accumulation adds no negatives; raise batch_size instead "
            "(with use_gradient_cache memory does not grow with it)"
        )
    yield from _agree(config, "train_micro_batch_size_per_gpu", ours.batch_size, "batch_size", ours)
    given = config.get("train_batch_size", "auto")
    if given not in ("auto", train):
        yield _train_batch_problem(given, train, ours)
    config["train_batch_size"], config["gradient_accumulation_steps"] = train, 1


def _train_batch_problem(given: Any, train: int, ours: _Ours) -> str:
    place = f"train_batch_size={as_json(given)} ({ours.origin})"
    if type(given) is int and given % ours.world_size:
        return (
            f"{place}: does not divide by {ours.world_size} ranks; "
            f'set "auto" ({ours.batch_size} per rank x {ours.world_size} ranks = {train})'
        )
    return (
        f"{place} != {ours.batch_size} micro x 1 accumulation x {ours.world_size} ranks "
        f'= {train}; set "auto"'
    )


def _clipping(config: dict[str, Any], ours: _Ours) -> Iterator[str]:
    # Always written: DeepSpeed clips at 1.0 when the key is missing.
    yield from _agree(config, "gradient_clipping", ours.max_grad_norm, "max_grad_norm", ours)


def _precision(config: dict[str, Any], ours: _Ours, supported: bool) -> Iterator[str]:
    if not supported:
        yield (
            f"precision={ours.precision}: not supported on device type {ours.device_type}; "
            "set precision=fp32, or run on a device that has it"
        )
    if ours.precision == "fp16" and value_at(config, "zero_optimization.stage") in (None, 0):
        yield (
            f"precision=fp16 with zero_optimization.stage=0 ({ours.origin}): DeepSpeed divides by "
            "the loss scale there without having multiplied by it; use stage 1, or precision=bf16"
        )
    for name in ("bf16", "fp16"):
        section = config.setdefault(name, {})
        wanted = name == ours.precision
        given = section.get("enabled", "auto")
        if given not in ("auto", wanted):
            yield (
                f"{name}.enabled={as_json(given)} ({ours.origin}) contradicts "
                f'precision={ours.precision} ({ours.place("precision")}); set "auto"'
            )
        section["enabled"] = wanted
    for path in ("data_types.grad_accum_dtype", "communication_data_type"):
        given = value_at(config, path)
        if given not in (None, "auto", ours.precision):
            yield (
                f"{path}={as_json(given)} ({ours.origin}): must be {ours.precision} as the model's "
                "precision (chunk gradients are summed in fp32 by our engine, not here); remove it"
            )
    types = config.setdefault("data_types", {})
    types["grad_accum_dtype"] = ours.precision
    if types.get("keep_in_fp32_modules") == "auto":  # DeepSpeed's own default, not ours to fill
        del types["keep_in_fp32_modules"]
    if config.get("communication_data_type") == "auto":
        config["communication_data_type"] = ours.precision


def _optimizer(config: dict[str, Any], ours: _Ours) -> Iterator[str]:
    optimizer = config.setdefault("optimizer", {"type": "AdamW"})
    kind = optimizer_type(config)
    yield from _optimizer_type_problems(optimizer.get("type"), ours)
    params = optimizer.setdefault("params", {})
    is_adam = kind in ("adam", "adamw")
    required = ("lr", "weight_decay", "betas", "eps") if is_adam else ("lr",)
    values = {
        "lr": (ours.lr, "lr"),
        "weight_decay": (ours.weight_decay, "weight_decay"),
        "betas": (list(ours.betas), "adam_beta1 and adam_beta2"),
        "eps": (ours.eps, "adam_epsilon"),
    }
    for key, (value, our_key) in values.items():
        if key in required or (key in params and key in PROVEN_OPTIMIZERS.get(kind, params)):
            yield from _agree(params, key, value, our_key, ours, prefix="optimizer.params.")
    if is_adam:
        yield from _implementation(config, params, ours)
    else:
        config.setdefault("zero_allow_untested_optimizer", True)  # SGD is tested, by us
    yield from _offloadable(config, kind, ours)
    if params.get("fused") is True and params.get("foreach") is True:
        yield (
            f"optimizer.params.foreach=true with fused=true ({ours.origin}): torch runs one of "
            "them; remove one"
        )
    for key in set(params) - PROVEN_OPTIMIZERS.get(kind, set(params)):
        if params[key] != "auto":  # it has the default; not every implementation takes the key
            del params[key]


def _optimizer_type_problems(given: Any, ours: _Ours) -> Iterator[str]:
    place = f"optimizer.type={as_json(given)} ({ours.origin})"
    if not given:
        yield f"{place}: required, for example AdamW; or remove the optimizer section"
    elif given != "SGD" and str(given).lower() not in ("adam", "adamw"):
        remedy = "write SGD" if str(given).lower() == "sgd" else "use AdamW"
        yield f"{place}: refused, only AdamW and SGD are proven exact here; {remedy}"


def _implementation(
    config: Mapping[str, Any], params: dict[str, Any], ours: _Ours
) -> Iterator[str]:
    """Choose torch's AdamW, or DeepSpeedCPUAdam for an optimizer that lives on the CPU."""
    if params.get("torch_adam", "auto") == "auto":
        params["torch_adam"] = not _is_offloaded(config)
    by_torch = params["torch_adam"] is True
    if not by_torch and not _is_offloaded(config):
        yield (
            f"optimizer.params.torch_adam={as_json(params['torch_adam'])} ({ours.origin}): "
            "DeepSpeed's FusedAdam is not proven exact here; set \"auto\" (torch's AdamW, fused on GPUs)"
        )
    if params.get("fused") == "auto":
        del params["fused"]
        if by_torch:
            params["fused"] = ours.device_type == "cuda" and params.get("foreach") is not True
    for key in ("fused", "foreach"):
        if key in params and not by_torch:
            remedy = "set torch_adam=true, or " + (
                'fused="auto"' if key == "fused" else "remove it"
            )
            place = f"optimizer.params.{key}={as_json(params[key])} ({ours.origin})"
            yield f"{place}: only torch's AdamW takes it; {remedy}"


def _offloadable(config: Mapping[str, Any], kind: str, ours: _Ours) -> Iterator[str]:
    forced = config.get("zero_force_ds_cpu_optimizer", True) is True
    foreign = kind == "sgd" or value_at(config, "optimizer.params.torch_adam") is True
    if _is_offloaded(config) and forced and foreign:
        yield (
            f'zero_optimization.offload_optimizer.device="cpu" ({ours.origin}): DeepSpeed '
            "offloads its own CPU Adam only; set optimizer.type=AdamW and "
            'torch_adam="auto", or zero_force_ds_cpu_optimizer=false'
        )


def _is_offloaded(config: Mapping[str, Any]) -> bool:
    return bool(value_at(config, "zero_optimization.offload_optimizer.device") == "cpu")


def _agree(
    section: dict[str, Any], key: str, value: Any, our_key: str, ours: _Ours, *, prefix: str = ""
) -> Iterator[str]:
    """Write our value; the JSON may leave it out, say "auto", or say the same."""
    given = section.get(key, "auto")
    section[key] = value
    if given != "auto" and not _same(given, value):
        yield (
            f"{prefix}{key}={as_json(given)} ({ours.origin}) contradicts "
            f'{our_key}={as_json(value)} ({ours.place(our_key)}); set "auto"'
        )


def _same(given: Any, value: Any) -> bool:
    if isinstance(value, list):
        is_pair = isinstance(given, list) and len(given) == len(value)
        return is_pair and all(_same(a, b) for a, b in zip(given, value, strict=True))
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    return is_number and math.isclose(given, value, rel_tol=1e-12)


def _autos(value: Any, path: str = "") -> Iterator[str]:
    if value == "auto":
        yield path
    items = value.items() if isinstance(value, Mapping) else ()
    for key, inner in items:
        yield from _autos(inner, f"{path}.{key}".lstrip("."))
