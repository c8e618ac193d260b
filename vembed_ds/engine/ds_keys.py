"""The keys of a DeepSpeed JSON: which exist, and which are proven to give the exact gradient.

In the sections a key may be set freely only when a row of :data:`PROVEN` has it. Every other key
that DeepSpeed knows must have DeepSpeed's default, and every other name is a typing error.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

_ACCUMULATION = "the gradient cache drives accumulation itself"
_BATCH = "our sampler decides what is in a batch"
_SCALE = "gradients would no longer be the mean over ranks"
_SHARDING = "sharding over anything but data-parallel ranks is not proven exact here"
_LOSSY = "it changes the gradient or the weights"
_PRECISION = "the YAML's precision decides number formats"
_CHECKPOINT = "our checkpoints and their export rely on DeepSpeed's default format"
_NVME = "only the device cpu is supported"
_NOT_FORWARDED = "it would have no effect, our engine does not hand it to DeepSpeed"
_NOT_PROVEN = "not proven exact here"


def _words(text: str) -> list[str]:
    return text.split()


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
"""Top-level keys that DeepSpeed 0.19.8 reads; removed ones are reported as such."""

REMOVED_KEYS = _words(
    "amp nebula compression_training quantize_training sparse_gradients eigenvalue "
    "sparse_attention elasticity graph_harvesting curriculum_learning progressive_layer_drop "
    "zero_optimization.mics_shard_size zero_optimization.mics_hierarchical_params_gather "
    "zero_optimization.zeropp_loco_param optimizer.params.max_grad_norm"
)

UNPROVEN_KEYS = {
    "torch_autocast": _PRECISION,
    "compile": "compiled graphs are not proven exact here",
    "pipeline": _SHARDING,
    "tensor_parallel": _SHARDING,
    "sequence_parallel_size": _SHARDING,
    "expert_parallel": _SHARDING,
    "use_data_before_expert_parallelism": _SHARDING,
    "hybrid_engine": _SHARDING,
    "data_efficiency": _BATCH,
    "autotuning": _BATCH,
    "weight_quantization": _LOSSY,
    "prescale_gradients": _SCALE,
    "disable_allgather": _NOT_PROVEN,
}
"""Top-level keys refused unless off: false, 0, 1, "none", empty, or with "enabled": false."""

FIXED_VALUES: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (True, _ACCUMULATION),
    "gradient_allreduce_op": ("mean", _SCALE),
    "gradient_predivide_factor": (1, _SCALE),
    "datastates_ckpt": (False, _CHECKPOINT),  # DeepSpeed takes an empty section as on
}
"""Value that a top-level key must have when it is given."""

_ADAM = frozenset(_words("lr betas eps weight_decay torch_adam fused foreach"))
_SGD = frozenset(_words("lr momentum nesterov weight_decay fused foreach"))
PROVEN_OPTIMIZERS = {"adam": _ADAM, "adamw": _ADAM, "sgd": _SGD}
"""Parameters that may be set, for each lower-case optimizer type."""

PROVEN = {
    "zero_optimization": frozenset(
        _words(
            "stage reduce_scatter reduce_bucket_size allgather_partitions "
            "allgather_bucket_size overlap_comm use_multi_rank_bucket_allreduce offload_optimizer "
            "offload_param sub_group_size stage3_max_live_parameters stage3_max_reuse_distance "
            "stage3_prefetch_bucket_size stage3_param_persistence_threshold "
            "stage3_model_persistence_threshold stage3_gather_16bit_weights_on_model_save "
            "memory_efficient_linear ignore_unused_parameters log_trace_cache_warnings "
            "zero_hpz_partition_size"
        )
    ),
    # Buffers and pipelines serve NVMe only; on the host they change nothing.
    "zero_optimization.offload_optimizer": frozenset(
        _words("device pin_memory buffer_count pipeline_read pipeline_write fast_init")
    ),
    "zero_optimization.offload_param": frozenset(
        _words("device pin_memory buffer_count buffer_size max_in_cpu")
    ),
    "fp16": frozenset(
        _words(
            "enabled loss_scale initial_scale_power loss_scale_window hysteresis "
            "consecutive_hysteresis min_loss_scale"
        )
    ),
    "bf16": frozenset(["enabled"]),
    "data_types": frozenset(["grad_accum_dtype"]),
    "activation_checkpointing": frozenset[str](),
    "checkpoint": frozenset(["tag_validation", "parallel_write"]),
    "checkpoint.parallel_write": frozenset[str](),
    "optimizer": frozenset(["type", "params"]),
}
"""Keys of each section that may be set to any value DeepSpeed takes."""

REASONS = {
    "bf16.bf16_master_weights_and_grads": _LOSSY,
    "bf16.bf16_optimizer_states": _LOSSY,
    "bf16.immediate_grad_update": _ACCUMULATION,
    "fp16.auto_cast": _PRECISION,
    "fp16.fp16_master_weights_and_grads": _LOSSY,
    "data_types.param_dtype": _PRECISION,
    "data_types.buffer_dtype": _PRECISION,
    "data_types.keep_in_fp32_modules": _PRECISION,
    "activation_checkpointing.cpu_checkpointing": (
        "on a CPU DeepSpeed empties the very tensors that it stores"
    ),
    "activation_checkpointing.partition_activations": _SHARDING,
    "activation_checkpointing.contiguous_memory_optimization": _ACCUMULATION,
    "activation_checkpointing.number_checkpoints": _NOT_FORWARDED,
    "activation_checkpointing.synchronize_checkpoint_boundary": _NOT_FORWARDED,
    "activation_checkpointing.profile": _NOT_FORWARDED,
    "checkpoint.load_universal": _CHECKPOINT,
    "checkpoint.checkpoint_serialization": _CHECKPOINT,
    "checkpoint.writer": _CHECKPOINT,
    "checkpoint.use_node_local_storage": _CHECKPOINT,
    "checkpoint.parallel_write.pipeline_stage": _CHECKPOINT,
    "zero_optimization.contiguous_gradients": (
        "DeepSpeed then fails on a [1, 1, D] parameter that is alone in its bucket"
    ),
    "zero_optimization.round_robin_gradients": "a checkpoint so trained is exported wrongly",
    "zero_optimization.compute_grad_norm": "clipping and the log need the norm",
    "zero_optimization.zero_quantized_weights": _LOSSY,
    "zero_optimization.zero_quantized_nontrainable_weights": _LOSSY,
    "zero_optimization.zero_quantized_gradients": _LOSSY,
    "zero_optimization.zenflow": _LOSSY,
    "zero_optimization.legacy_stage1": _ACCUMULATION,
    "zero_optimization.cpu_offload": "deprecated; write offload_optimizer",
    "zero_optimization.cpu_offload_param": "deprecated; write offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "deprecated; write pin_memory in offload_*",
    "zero_optimization.offload_optimizer.super_offload": _LOSSY,
    "zero_optimization.offload_optimizer.ratio": "partial offload is not proven exact here",
    "zero_optimization.offload_optimizer.nvme_path": _NVME,
    "zero_optimization.offload_param.nvme_path": _NVME,
    "optimizer.params.adam_w_mode": "only AdamW's decay, apart from the gradient, is proven exact",
}
"""Why a key that :data:`PROVEN` lacks is refused, where more can be said than "not proven"."""

_NULLABLE = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")


def shape_problems(config: Mapping[str, Any], origin: str) -> Iterator[str]:
    """Sections that are not objects; null stands for "no offload" in DeepSpeed."""
    for path in (*PROVEN, "optimizer.params"):
        value = value_at(config, path)
        absent = not has_key(config, path) or (path in _NULLABLE and value is None)
        if not absent and not isinstance(value, Mapping):
            yield f"{path}={as_json(value)} ({origin}): expected an object of its keys"


def key_problems(config: Mapping[str, Any], origin: str) -> Iterator[str]:
    """Keys that are unknown, removed, or not proven exact; sections must be objects.

    Args:
        config: The JSON's content.
        origin: The JSON's name, for messages.
    """
    yield from _unknown(config, dict.fromkeys(KNOWN_KEYS), "", origin)
    yield from _top_level(config, origin)
    kind = optimizer_type(config)
    params = {"optimizer.params": _optimizer_defaults(kind)} if kind in PROVEN_OPTIMIZERS else {}
    for path, defaults in (_section_defaults() | params).items():
        section = value_at(config, path) or {}
        proven = PROVEN_OPTIMIZERS[kind] if path in params else PROVEN[path]
        yield from _unknown(section, defaults, f"{path}.", origin)
        for key, default in defaults.items():
            is_proven = key in proven or f"stage3_{key}" in proven  # a field's name, or its alias
            if key in section and not is_proven and section[key] not in (default, "auto"):
                yield _refusal(f"{path}.{key}", section[key], origin)


def optimizer_type(config: Mapping[str, Any]) -> str:
    """Lower-case ``optimizer.type``; empty when there is none."""
    return str(value_at(config, "optimizer.type") or "").lower()


def value_at(config: Mapping[str, Any], path: str) -> Any:
    """Value at a dotted path; None when a part of it is absent."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def has_key(config: Mapping[str, Any], path: str) -> bool:
    """Whether a dotted path is given, be it as null."""
    parent, _, key = path.rpartition(".")
    section = value_at(config, parent) if parent else config
    return isinstance(section, Mapping) and key in section


def as_json(value: Any) -> str:
    """The value as the file has it."""
    return json.dumps(value)


def _unknown(
    section: Mapping[str, Any], known: Mapping[str, Any], prefix: str, origin: str
) -> Iterator[str]:
    for key in section:
        if key not in known and f"{prefix}{key}" not in REMOVED_KEYS:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else "remove it"
            yield f"{prefix}{key} ({origin}): not a DeepSpeed key; {remedy}"


def _top_level(config: Mapping[str, Any], origin: str) -> Iterator[str]:
    for path in REMOVED_KEYS:
        if has_key(config, path):
            yield f"{path} ({origin}): refused, DeepSpeed has removed it; remove it"
    for key, reason in UNPROVEN_KEYS.items():
        if key in config and not _is_off(config[key]):
            yield f"{key}={as_json(config[key])} ({origin}): refused, {reason}; remove it"
    for key, (fixed, reason) in FIXED_VALUES.items():
        if key in config and config[key] != fixed:
            place = f"{key}={as_json(config[key])} ({origin})"
            yield f"{place}: only {as_json(fixed)} is supported, {reason}; remove it"
    if "bfloat16" in config:
        yield f"bfloat16 ({origin}): deprecated; write bf16"
    if "scheduler" in config:
        yield (
            f"scheduler ({origin}): refused, the schedule is set in the YAML; "
            "remove it and set scheduler_type, warmup_ratio or warmup_steps"
        )


def _refusal(path: str, value: Any, origin: str) -> str:
    reason = REASONS.get(path, _NOT_PROVEN)
    return f"{path}={as_json(value)} ({origin}): refused, {reason}; remove it"


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("enabled") is False or all(_is_off(inner) for inner in value.values())
    return value is not True and value in (None, False, 0, 1, "none")


@functools.cache
def _section_defaults() -> dict[str, dict[str, Any]]:
    """DeepSpeed's keys and defaults of every section in :data:`PROVEN`."""
    # Imported here: deepspeed takes seconds to import.
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = "zero_optimization"
    return {
        zero: _fields(DeepSpeedZeroConfig),
        f"{zero}.offload_optimizer": _fields(offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        f"{zero}.offload_param": _fields(offload_config.DeepSpeedZeroOffloadParamConfig),
        "fp16": _fields(DeepSpeedFP16Config),
        "bf16": _fields(DeepSpeedBF16Config),
        "data_types": dict.fromkeys(_words("grad_accum_dtype param_dtype buffer_dtype"))
        | {"keep_in_fp32_modules": "auto"},
        "activation_checkpointing": dict(ACT_CHKPT_DEFAULT),
        "checkpoint": {
            "tag_validation": "WARN",
            "checkpoint_serialization": True,
            "writer": None,
            "load_universal": False,
            "use_node_local_storage": False,
            "parallel_write": None,
        },
        "checkpoint.parallel_write": {"pipeline_stage": False},
        "optimizer": {"type": None, "params": None, "legacy_fusion": False},
    }


def _fields(model: Any) -> dict[str, Any]:
    """Fields of a pydantic model under their names and aliases, with their defaults."""
    fields = model.model_fields.items()
    by_name = {name: field.default for name, field in fields}
    return by_name | {field.alias: field.default for _, field in fields if field.alias}


def _optimizer_defaults(kind: str) -> dict[str, Any]:
    """Parameters of torch's optimizer and, for Adam, of DeepSpeed's two."""
    import torch

    optimizer = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
    parameters = list(inspect.signature(optimizer).parameters.values())[1:]  # without `params`
    defaults = {parameter.name: parameter.default for parameter in parameters}
    if kind != "sgd":
        switches = "adam_w_mode bias_correction set_grad_none fp32_optimizer_states"
        defaults |= {"torch_adam": False} | dict.fromkeys(_words(switches), True)
    return defaults
