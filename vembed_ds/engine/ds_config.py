"""The DeepSpeed JSON: every ``"auto"`` filled from our configuration, every contradiction named.

DeepSpeed reads a key that it does not know, or that contradicts another, mostly without a word,
and clips at 1.0 when ``gradient_clipping`` is absent. So the dict handed to it is complete, and
what is not proven to give the exact gradient is refused here by name.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed_ds.errors import ConfigError

NEVER_PRINT = 10**12
"""``steps_per_print`` when the JSON has none: our own logger reports the steps."""

_REMOVED = "DeepSpeed has removed it"
_ACCUMULATION = "the gradient cache drives accumulation itself"
_BATCH = "our sampler decides what is in a batch"
_SCALE = "gradients would no longer be the mean over ranks"
_SHARDING = "sharding over anything but data-parallel ranks is not proven exact here"
_LOSSY = "it changes the gradient or the weights"
_PRECISION = "the YAML's precision decides number formats"


def _words(text: str) -> list[str]:
    return text.split()


_REMOVED_KEYS = _words(
    "amp nebula compression_training quantize_training sparse_gradients eigenvalue "
    "sparse_attention elasticity graph_harvesting curriculum_learning progressive_layer_drop "
    "zero_optimization.mics_shard_size zero_optimization.mics_hierarchical_params_gather "
    "zero_optimization.zeropp_loco_param optimizer.params.max_grad_norm"
)

# Harmless while switched off: false, 0, 1, "none", an empty section, or one with "enabled": false.
_UNPROVEN_KEYS = {
    "torch_autocast": _PRECISION,
    "bf16.bf16_master_weights_and_grads": _LOSSY,
    "bf16.bf16_optimizer_states": _LOSSY,
    "bf16.immediate_grad_update": _ACCUMULATION,
    "fp16.auto_cast": _PRECISION,
    "fp16.fp16_master_weights_and_grads": _LOSSY,
    "data_types.param_dtype": _PRECISION,
    "data_types.buffer_dtype": _PRECISION,
    "compile": "compiled graphs are not proven exact here",
    "pipeline": _SHARDING,
    "tensor_parallel": _SHARDING,
    "sequence_parallel_size": _SHARDING,
    "expert_parallel": _SHARDING,
    "hybrid_engine": _SHARDING,
    "data_efficiency": _BATCH,
    "autotuning": _BATCH,
    "weight_quantization": _LOSSY,
    "prescale_gradients": _SCALE,
    "activation_checkpointing.contiguous_memory_optimization": _ACCUMULATION,
    "zero_optimization.zero_hpz_partition_size": _SHARDING,
    "zero_optimization.zero_quantized_weights": _LOSSY,
    "zero_optimization.zero_quantized_nontrainable_weights": _LOSSY,
    "zero_optimization.zero_quantized_gradients": _LOSSY,
    "zero_optimization.zenflow": _LOSSY,
    "zero_optimization.legacy_stage1": _ACCUMULATION,
    "zero_optimization.cpu_offload": "deprecated; write offload_optimizer",
    "zero_optimization.cpu_offload_param": "deprecated; write offload_param",
    "zero_optimization.offload_optimizer.super_offload": _LOSSY,
}

# Value a key must have when it is given.
_FIXED_VALUES: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (True, _ACCUMULATION),
    "gradient_allreduce_op": ("mean", _SCALE),
    "gradient_predivide_factor": (1, _SCALE),
    "zero_optimization.compute_grad_norm": (True, "clipping and the log need the norm"),
    "zero_optimization.offload_optimizer.ratio": (1, "partial offload is not proven exact here"),
}

KNOWN_KEYS = frozenset(
    _words(
        "activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger "
        "communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last "
        "datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel "
        "flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping "
        "gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation "
        "memory_breakdown monitor_config optimizer pipeline prescale_gradients scheduler seed "
        "seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel "
        "tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu "
        "use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb "
        "weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
        "zero_optimization"
    )
)
"""Top-level keys that DeepSpeed 0.19.8 reads; removed ones are reported as such before."""

_SIZED_BY_HF = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
_UNSUPPORTED_OPTIMIZERS = ("onebit", "zeroone", "muon")


@dataclass(frozen=True)
class _Ours:
    """The values that our own configuration decides."""

    origin: str
    world_size: int
    batch_size: int
    precision: str
    max_grad_norm: float
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    device_type: str


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
) -> dict[str, Any]:
    """Fill every ``"auto"``, write what DeepSpeed would default, and refuse contradictions.

    ``"auto"`` for reduce_bucket_size, stage3_prefetch_bucket_size and
    stage3_param_persistence_threshold, which Hugging Face's integration fills from the hidden
    size, removes the key: DeepSpeed's documented default applies.

    Args:
        raw: The JSON's content; not changed.
        origin: The JSON's name, for messages.
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

    Returns:
        A new dict in which nothing is left to chance.

    Raises:
        ConfigError: Listing every unknown, refused or contradicting key.
    """
    ours = _Ours(
        origin, world_size, batch_size, precision, max_grad_norm, lr, betas, eps, weight_decay,
        device_type,
    )  # fmt: skip
    config = copy.deepcopy(dict(raw))
    problems = [*_unknown_keys(config, origin), *_malformed(config, origin)]
    if problems:  # the rules below rely on the shape of the sections
        raise ConfigError(problems)
    supported = {"fp32": True, "fp16": fp16_supported, "bf16": bf16_supported}
    problems += _refused(config, origin)
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


def _unknown_keys(config: Mapping[str, Any], origin: str) -> Iterator[str]:
    yield from _unknown(config, KNOWN_KEYS | {k for k in _REMOVED_KEYS if "." not in k}, "", origin)
    zero = config.get("zero_optimization")
    if isinstance(zero, Mapping):
        prefix = "zero_optimization."
        removed = {key.removeprefix(prefix) for key in _REMOVED_KEYS if key.startswith(prefix)}
        yield from _unknown(zero, _zero_keys() | removed, prefix, origin)


def _unknown(
    section: Mapping[str, Any], known: Collection[str], prefix: str, origin: str
) -> Iterator[str]:
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else "remove it"
            yield f"{prefix}{key} ({origin}): not a DeepSpeed key; {remedy}"


def _zero_keys() -> set[str]:
    # Imported here: deepspeed takes seconds to import.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    return {*fields, *(field.alias for field in fields.values() if field.alias)}


def _malformed(config: Mapping[str, Any], origin: str) -> Iterator[str]:
    sections = ("bf16", "fp16", "data_types", "optimizer", "optimizer.params", "zero_optimization")
    offload = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
    for path in (*sections, *offload):
        value = _get(config, path)
        absent = path in offload and value is None  # null is how DeepSpeed writes "no offload"
        if _has(config, path) and not absent and not isinstance(value, Mapping):
            yield f"{path}={_json(value)} ({origin}): expected an object of its keys"
    if "bfloat16" in config:
        yield f"bfloat16 ({origin}): deprecated; write bf16"


def _refused(config: Mapping[str, Any], origin: str) -> Iterator[str]:
    for path in _REMOVED_KEYS:
        if _has(config, path):
            yield f"{path} ({origin}): refused, {_REMOVED}; remove it"
    for path, reason in _UNPROVEN_KEYS.items():
        if _has(config, path) and not _is_off(_get(config, path)):
            value = _json(_get(config, path))
            yield f"{path}={value} ({origin}): refused, {reason}; remove it"
    for path, (fixed, reason) in _FIXED_VALUES.items():
        if _has(config, path) and _get(config, path) != fixed:
            value = _json(_get(config, path))
            yield f"{path}={value} ({origin}): only {_json(fixed)} is supported, {reason}; remove it"
    if "scheduler" in config:
        yield (
            f"scheduler ({origin}): refused, the schedule is set in the YAML; "
            "remove it and set scheduler_type, warmup_ratio or warmup_steps"
        )


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("enabled") is False or all(_is_off(inner) for inner in value.values())
    return value is not True and value in (None, False, 0, 1, "none")


def _zero(config: dict[str, Any], ours: _Ours) -> Iterator[str]:
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage={_json(stage)} ({ours.origin}): expected 0, 1, 2 or 3"
        return
    for key in _SIZED_BY_HF:
        if zero.get(key) == "auto":
            del zero[key]
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = _get(zero, f"{key}.device")
        path = f"zero_optimization.{key}.device={_json(device)} ({ours.origin})"
        if device not in (None, "none", "cpu"):
            yield f'{path}: only "cpu" and "none" are supported in this version'
        elif device == "cpu" and stage < lowest:
            yield f"{path}: needs stage {lowest} or above, not {stage}; raise stage or remove it"


def _batch(config: dict[str, Any], ours: _Ours) -> Iterator[str]:
    """Fill the batch triple; DeepSpeed asserts train = micro x accumulation x ranks."""
    train = ours.batch_size * ours.world_size
    accumulation = config.get("gradient_accumulation_steps", "auto")
    if accumulation not in ("auto", 1):
        yield (
            f"gradient_accumulation_steps={_json(accumulation)} ({ours.origin}): only 1 is "
            "supported, because accumulation adds no negatives; raise batch_size instead "
            "(with use_gradient_cache memory does not grow with it)"
        )
    yield from _agree(config, "train_micro_batch_size_per_gpu", ours.batch_size, "batch_size", ours)
    given = config.get("train_batch_size", "auto")
    if given not in ("auto", train):
        yield _train_batch_problem(given, train, ours)
    config["train_batch_size"], config["gradient_accumulation_steps"] = train, 1


def _train_batch_problem(given: Any, train: int, ours: _Ours) -> str:
    place = f"train_batch_size={_json(given)} ({ours.origin})"
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
    if ours.precision == "fp16" and _get(config, "zero_optimization.stage") in (None, 0):
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
                f"{name}.enabled={_json(given)} ({ours.origin}) contradicts "
                f'precision={ours.precision} (YAML); set "auto"'
            )
        section["enabled"] = wanted
    for path in ("data_types.grad_accum_dtype", "communication_data_type"):
        given = _get(config, path)
        if given not in (None, "auto", ours.precision):
            yield (
                f"{path}={_json(given)} ({ours.origin}): must be {ours.precision} as the model's "
                "precision (chunk gradients are summed in fp32 by our engine, not here); remove it"
            )
    config.setdefault("data_types", {})["grad_accum_dtype"] = ours.precision
    if config.get("communication_data_type") == "auto":
        config["communication_data_type"] = ours.precision


def _optimizer(config: dict[str, Any], ours: _Ours) -> Iterator[str]:
    optimizer = config.setdefault("optimizer", {"type": "AdamW"})
    kind = str(optimizer.get("type", "")).lower()
    place = f"optimizer.type={_json(optimizer.get('type'))} ({ours.origin})"
    if not kind:
        yield f"{place}: required, for example AdamW; or remove the optimizer section"
    if kind.startswith(_UNSUPPORTED_OPTIMIZERS):
        yield f"{place}: refused, its own communication or grouping is not proven exact here; use AdamW"
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
        if key in params or key in required:
            yield from _agree(params, key, value, our_key, ours, prefix="optimizer.params.")
    yield from _implementation(config, params, kind, ours)


def _implementation(
    config: Mapping[str, Any], params: dict[str, Any], kind: str, ours: _Ours
) -> Iterator[str]:
    """Choose torch's AdamW, or DeepSpeedCPUAdam for an optimizer that lives on the CPU."""
    offloaded = _get(config, "zero_optimization.offload_optimizer.device") == "cpu"
    if kind in ("adam", "adamw"):
        if params.get("torch_adam", "auto") == "auto":
            params["torch_adam"] = not offloaded
        if params.get("fused") == "auto":
            del params["fused"]
            if params["torch_adam"] is True:
                params["fused"] = ours.device_type == "cuda"
        if "fused" in params and params["torch_adam"] is not True:
            yield (
                f"optimizer.params.fused={_json(params['fused'])} ({ours.origin}): only torch's "
                'AdamW takes it; set torch_adam=true, or fused="auto"'
            )
    forced = config.get("zero_force_ds_cpu_optimizer", True) is True
    foreign = kind not in ("adam", "adamw", "lion", "") or params.get("torch_adam") is True
    if offloaded and forced and foreign:
        yield (
            f'zero_optimization.offload_optimizer.device="cpu" ({ours.origin}): DeepSpeed '
            "offloads its own CPU Adam or Lion only; set optimizer.type=AdamW and "
            'torch_adam="auto", or zero_force_ds_cpu_optimizer=false'
        )


def _agree(
    section: dict[str, Any], key: str, value: Any, our_key: str, ours: _Ours, *, prefix: str = ""
) -> Iterator[str]:
    """Write our value; the JSON may leave it out, say "auto", or say the same."""
    given = section.get(key, "auto")
    section[key] = value
    if given != "auto" and not _same(given, value):
        yield (
            f"{prefix}{key}={_json(given)} ({ours.origin}) contradicts "
            f'{our_key}={_json(value)} (YAML); set "auto"'
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


def _get(config: Mapping[str, Any], path: str) -> Any:
    """Value at a dotted path; None when a part of it is absent."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _has(config: Mapping[str, Any], path: str) -> bool:
    parent, _, key = path.rpartition(".")
    section = _get(config, parent) if parent else config
    return isinstance(section, Mapping) and key in section


def _json(value: Any) -> str:
    return json.dumps(value)
