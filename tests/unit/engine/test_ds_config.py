from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from vembed_ds.engine import ds_keys
from vembed_ds.engine.ds_config import load_ds_config, resolve_ds_config
from vembed_ds.errors import ConfigError

OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("zero*.json"))
OURS: dict[str, Any] = {
    "origin": "x.json",
    "origins": {"batch_size": "my.yaml", "lr": "--config_override", "adam_beta2": "my.yaml"},
    "world_size": 4,
    "batch_size": 16,
    "precision": "fp32",
    "max_grad_norm": 0.5,
    "lr": 1e-4,
    "betas": (0.9, 0.98),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "device_type": "cpu",
    "fp16_supported": False,
    "bf16_supported": True,
}


def resolve(raw: dict[str, Any], **ours: Any) -> dict[str, Any]:
    return resolve_ds_config(raw, **(OURS | ours))


def problems_of(raw: dict[str, Any], **ours: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(raw, **ours)
    return caught.value.problems


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def test_six_files_are_shipped():
    names = [path.stem for path in SHIPPED]
    assert names == ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_shipped_files_resolve_and_deepspeed_accepts_them(path, precision, world_size, monkeypatch):
    from deepspeed.runtime import config as deepspeed_config

    raw = load_ds_config(path)
    if (path.stem, precision) == ("zero0", "fp16"):
        assert (
            "DeepSpeed divides by the loss scale"
            in problems_of(raw, precision=precision, fp16_supported=True)[0]
        )
        return
    config = resolve(raw, world_size=world_size, precision=precision, fp16_supported=True)
    assert json.loads(json.dumps(config)) == config
    assert '"auto"' not in json.dumps(config)
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: world_size)
    accepted = deepspeed_config.DeepSpeedConfig(config)
    assert accepted.train_batch_size == 16 * world_size
    assert accepted.gradient_accumulation_steps == 1
    assert accepted.gradient_clipping == 0.5
    assert accepted.grad_accum_dtype == precision
    assert accepted.zero_optimization_stage == int(path.stem[4])
    assert (accepted.bfloat16_config.enabled, accepted.float16_config.enabled) == (
        precision == "bf16",
        precision == "fp16",
    )


def test_everything_is_written_for_an_empty_json():
    raw: dict[str, Any] = {}
    assert resolve(raw) == {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 0},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 1e-4,
                "weight_decay": 0.1,
                "betas": [0.9, 0.98],
                "eps": 1e-6,
                "torch_adam": True,
            },
        },
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
    assert raw == {}


def test_the_input_is_not_changed():
    raw = load_ds_config(SHIPPED[-1])
    before = copy.deepcopy(raw)
    resolve(raw)
    assert raw == before


def test_clipping_off_is_written_too():
    assert resolve({}, max_grad_norm=0.0)["gradient_clipping"] == 0.0


def test_equal_values_and_harmless_switches_pass():
    raw = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "sequence_parallel_size": 1,
        "compile": {"deepcompile": False},
        "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
        "managed_gradient_accumulation": True,
        "zero_optimization": {
            "stage": 1,
            "zero_hpz_partition_size": 1,
            "offload_param": None,
            "offload_optimizer": {"device": "none"},
        },
        "optimizer": {"type": "Adam", "params": {"lr": 0.0001, "betas": [0.9, 0.98]}},
        "steps_per_print": 5,
        "wall_clock_breakdown": True,
    }
    config = resolve(raw)
    assert config["steps_per_print"] == 5
    assert config["wall_clock_breakdown"] is True
    assert config["optimizer"]["params"]["eps"] == 1e-6


def test_auto_sizes_of_hugging_face_fall_back_to_deepspeed_defaults():
    keys = (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    )
    zero = {"stage": 3} | dict.fromkeys(keys, "auto")
    assert resolve({"zero_optimization": zero})["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"train_batch_size": 96},
            "train_batch_size=96 (x.json) != 16 micro x 1 accumulation x 4 ranks = 64; "
            'set "auto"',
        ),
        (
            {"train_batch_size": 98},
            "train_batch_size=98 (x.json): does not divide by 4 ranks; "
            'set "auto" (16 per rank x 4 ranks = 64)',
        ),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu=8 (x.json) contradicts batch_size=16 (my.yaml); "
            'set "auto"',
        ),
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2 (x.json): only 1 is supported, because accumulation "
            "adds no negatives; raise batch_size instead (with use_gradient_cache memory does "
            "not grow with it)",
        ),
        (
            {"gradient_clipping": 1.0},
            'gradient_clipping=1.0 (x.json) contradicts max_grad_norm=0.5 (default); set "auto"',
        ),
        (
            {"bf16": {"enabled": True}},
            'bf16.enabled=true (x.json) contradicts precision=fp32 (default); set "auto"',
        ),
        (
            {"fp16": {"enabled": True}},
            'fp16.enabled=true (x.json) contradicts precision=fp32 (default); set "auto"',
        ),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            'data_types.grad_accum_dtype="bf16" (x.json): must be fp32 as the model\'s precision '
            "(chunk gradients are summed in fp32 by our engine, not here); remove it",
        ),
        (
            {"communication_data_type": "fp16"},
            'communication_data_type="fp16" (x.json): must be fp32 as the model\'s precision '
            "(chunk gradients are summed in fp32 by our engine, not here); remove it",
        ),
        (
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage=4 (x.json): expected 0, 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"stage": True}},
            "zero_optimization.stage=true (x.json): expected 0, 1, 2 or 3",
        ),
        (
            nested("zero_optimization.offload_optimizer.device", "cpu"),
            'zero_optimization.offload_optimizer.device="cpu" (x.json): needs stage 1 or above, '
            "not 0; raise stage or remove it",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            'zero_optimization.offload_param.device="cpu" (x.json): needs stage 3 or above, '
            "not 2; raise stage or remove it",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            'zero_optimization.offload_param.device="nvme" (x.json): only "cpu" and "none" are '
            "supported in this version",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "scheduler (x.json): refused, the schedule is set in the YAML; "
            "remove it and set scheduler_type, warmup_ratio or warmup_steps",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3}}},
            'optimizer.params.lr=3 (x.json) contradicts lr=0.0001 (--config_override); set "auto"',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}},
            "optimizer.params.betas=[0.9, 0.999] (x.json) contradicts adam_beta1 and adam_beta2="
            '[0.9, 0.98] (default, my.yaml); set "auto"',
        ),
        (
            {"optimizer": {"params": {}}},
            "optimizer.type=null (x.json): required, for example AdamW; "
            "or remove the optimizer section",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": "auto"}}},
            'optimizer.params.momentum="auto" (x.json): nothing in the YAML decides it; '
            "give a value or remove it",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}},
            "optimizer.params.torch_adam=false (x.json): DeepSpeed's FusedAdam is not proven exact "
            "here; set \"auto\" (torch's AdamW, fused on GPUs)",
        ),
        (
            {
                "zero_optimization": OFFLOADED,
                "optimizer": {"type": "AdamW", "params": {"fused": True, "torch_adam": False}},
            },
            "optimizer.params.fused=true (x.json): only torch's AdamW takes it; "
            'set torch_adam=true, or fused="auto"',
        ),
        (
            {
                "zero_optimization": OFFLOADED,
                "optimizer": {"type": "AdamW", "params": {"foreach": True, "torch_adam": False}},
            },
            "optimizer.params.foreach=true (x.json): only torch's AdamW takes it; "
            "set torch_adam=true, or remove it",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"foreach": True, "fused": True}}},
            "optimizer.params.foreach=true with fused=true (x.json): torch runs one of them; "
            "remove one",
        ),
        ({"zero_optimizaton": {}}, "zero_optimizaton (x.json): not a DeepSpeed key; did you mean zero_optimization?"),
        ({"qqqq": {}}, "qqqq (x.json): not a DeepSpeed key; remove it"),
        (
            {"zero_optimization": {"overlap_com": True}},
            "zero_optimization.overlap_com (x.json): not a DeepSpeed key; "
            "did you mean zero_optimization.overlap_comm?",
        ),
        ({"bf16": True}, "bf16=true (x.json): expected an object of its keys"),
        ({"zero_optimization": None}, "zero_optimization=null (x.json): expected an object of its keys"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 (x.json): deprecated; write bf16"),
    ],
)  # fmt: skip
def test_each_problem_by_its_message(raw, message):
    assert problems_of(raw) == [message]


@pytest.mark.parametrize("kind", ["OneBitAdam", "Muon", "Lion", "Lamb", "RMSprop", 3])
def test_optimizers_that_are_not_proven(kind):
    raw = {"type": kind, "params": {"momentum": 0.9}}
    assert problems_of({"optimizer": raw}) == [
        f"optimizer.type={json.dumps(kind)} (x.json): refused, only AdamW and SGD are proven exact "
        "here; use AdamW"
    ]


def test_torch_spells_sgd_in_capitals():
    assert problems_of({"optimizer": {"type": "sgd"}}) == [
        'optimizer.type="sgd" (x.json): refused, only AdamW and SGD are proven exact here; '
        "write SGD"
    ]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_that_the_device_lacks(precision):
    raw = {"zero_optimization": {"stage": 1}}
    found = problems_of(raw, precision=precision, fp16_supported=False, bf16_supported=False)
    assert found == [
        f"precision={precision}: not supported on device type cpu; "
        "set precision=fp32, or run on a device that has it"
    ]


@pytest.mark.parametrize("path", ds_keys.REMOVED_KEYS)
@pytest.mark.parametrize("value", [{}, {"enabled": False}, -1])
def test_keys_that_deepspeed_removed(path, value):
    raw = nested(path, value)
    if "optimizer" in raw:
        raw["optimizer"]["type"] = "AdamW"
    expected = f"{path} (x.json): refused, DeepSpeed has removed it; remove it"
    assert problems_of(raw) == [expected]


SWITCH_ON = {
    "sequence_parallel_size": 2,
    "compile": {"deepcompile": True},
    "tensor_parallel": {"autotp_size": 2},
    "weight_quantization": {"post_init_quant": {"x": {"num_bits": 8}}},
    "pipeline": {"stages": 2},
}


@pytest.mark.parametrize("key", ds_keys.UNPROVEN_KEYS)
def test_top_level_switches_are_refused_by_name(key):
    value = SWITCH_ON.get(key, True)
    reason = ds_keys.UNPROVEN_KEYS[key]
    expected = f"{key}={json.dumps(value)} (x.json): refused, {reason}; remove it"
    assert problems_of({key: value}) == [expected]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("managed_gradient_accumulation", False),
        ("gradient_allreduce_op", "sum"),
        ("gradient_predivide_factor", 2.0),
        ("datastates_ckpt", {}),
    ],
)
def test_values_that_are_fixed(key, value):
    fixed, reason = ds_keys.FIXED_VALUES[key]
    assert problems_of({key: value}) == [
        f"{key}={json.dumps(value)} (x.json): only {json.dumps(fixed)} is supported, {reason}; "
        "remove it"
    ]


def test_every_row_of_the_fixed_values_is_tested():
    assert len(ds_keys.FIXED_VALUES) == 4


def section_keys(*, proven: bool) -> list[tuple[str, Any]]:
    """Every key that DeepSpeed knows in a section, with its default."""
    found = []
    for section, defaults in ds_keys._section_defaults().items():
        for key, default in defaults.items():
            known = {key, f"stage3_{key}"} & ds_keys.PROVEN[section]
            if bool(known) is proven:
                found.append((f"{section}.{key}", default))
    return found


def in_section(path: str, value: Any) -> dict[str, Any]:
    raw = nested(path, value)
    if "optimizer" in raw:
        raw["optimizer"]["type"] = "AdamW"
    return raw


def test_every_key_of_a_section_that_is_not_proven_must_have_its_default():
    keys = section_keys(proven=False)
    assert len(keys) > 50
    for path, default in keys:
        value = not default if isinstance(default, bool) else "other"
        reason = ds_keys.REASONS.get(path, "not proven exact here")
        assert problems_of(in_section(path, value)) == [
            f"{path}={json.dumps(value)} (x.json): refused, {reason}; remove it"
        ]
        if isinstance(default, bool | int | float | None):
            resolve(in_section(path, default))


def test_the_tables_name_keys_that_deepspeed_has():
    defaults = ds_keys._section_defaults()
    assert defaults.keys() == ds_keys.PROVEN.keys()
    for section, proven in ds_keys.PROVEN.items():
        assert proven <= defaults[section].keys(), section
    for kind, proven in ds_keys.PROVEN_OPTIMIZERS.items():
        assert proven <= ds_keys._optimizer_defaults(kind).keys(), kind
    unproven = {path for path, _ in section_keys(proven=False)}
    assert ds_keys.REASONS.keys() - unproven == {"optimizer.params.adam_w_mode"}


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("zero_optimization.round_robin_gradients", True, "a checkpoint so trained is exported wrongly"),
        ("zero_optimization.contiguous_gradients", False, "DeepSpeed then fails on a [1, 1, D] parameter that is alone in its bucket"),
        ("zero_optimization.stage3_allgather_sequential", True, "not proven exact here"),
        ("zero_optimization.parameter_alignment", True, "not proven exact here"),
        ("zero_optimization.load_from_fp32_weights", False, "not proven exact here"),
        ("zero_optimization.leaf_module", {"names": ["x"]}, "not proven exact here"),
        ("zero_optimization.zenflow", {}, "it changes the gradient or the weights"),
        ("zero_optimization.zero_quantized_weights", True, "it changes the gradient or the weights"),
        ("zero_optimization.zero_quantized_gradients", True, "it changes the gradient or the weights"),
        ("zero_optimization.compute_grad_norm", False, "clipping and the log need the norm"),
        ("zero_optimization.cpu_offload", True, "deprecated; write offload_optimizer"),
        ("zero_optimization.offload_optimizer.ratio", 0.5, "partial offload is not proven exact here"),
        ("zero_optimization.offload_optimizer.nvme_path", "/x", "only the device cpu is supported"),
        ("bf16.check_grad_overflow", False, "not proven exact here"),
        ("fp16.auto_cast", True, "the YAML's precision decides number formats"),
        ("data_types.keep_in_fp32_modules", ["norm"], "the YAML's precision decides number formats"),
        ("activation_checkpointing.cpu_checkpointing", True, "on a CPU DeepSpeed empties the very tensors that it stores"),
        ("activation_checkpointing.partition_activations", True, "sharding over anything but data-parallel ranks is not proven exact here"),
        ("activation_checkpointing.contiguous_memory_optimization", True, "the gradient cache drives accumulation itself"),
        ("activation_checkpointing.number_checkpoints", 4, "it would have no effect, our engine does not hand it to DeepSpeed"),
        ("checkpoint.load_universal", True, "our checkpoints and their export rely on DeepSpeed's default format"),
        ("checkpoint.writer", {"type": "mock"}, "our checkpoints and their export rely on DeepSpeed's default format"),
        ("optimizer.legacy_fusion", True, "not proven exact here"),
        ("optimizer.params.amsgrad", True, "not proven exact here"),
        ("optimizer.params.maximize", True, "not proven exact here"),
        ("optimizer.params.bias_correction", False, "not proven exact here"),
        ("optimizer.params.fp32_optimizer_states", False, "not proven exact here"),
        ("optimizer.params.adam_w_mode", False, "only AdamW's decay, apart from the gradient, is proven exact"),
    ],
)  # fmt: skip
def test_features_that_are_not_proven_are_refused_by_name(path, value, reason):
    expected = f"{path}={json.dumps(value)} (x.json): refused, {reason}; remove it"
    assert problems_of(in_section(path, value)) == [expected]


def test_dampening_is_refused():
    raw = {"type": "SGD", "params": {"momentum": 0.9, "dampening": 0.1}}
    assert problems_of({"optimizer": raw}) == [
        "optimizer.params.dampening=0.1 (x.json): refused, not proven exact here; remove it"
    ]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("zero_optimization.round_robin_gradient", "round_robin_gradients"),
        ("zero_optimization.offload_optimizer.pin_memroy", "pin_memory"),
        ("zero_optimization.offload_param.devise", "device"),
        ("fp16.los_scale", "loss_scale"),
        ("bf16.enable", "enabled"),
        ("data_types.grad_accum_type", "grad_accum_dtype"),
        ("activation_checkpointing.cpu_checkpoint", "cpu_checkpointing"),
        ("checkpoint.load_universl", "load_universal"),
        ("checkpoint.parallel_write.pipelin_stage", "pipeline_stage"),
        ("optimizer.parms", "params"),
        ("optimizer.params.weight_decy", "weight_decay"),
    ],
)
def test_typing_errors_in_sections(path, meant):
    section = path.rpartition(".")[0]
    expected = f"{path} (x.json): not a DeepSpeed key; did you mean {section}.{meant}?"
    assert problems_of(in_section(path, True)) == [expected]


@pytest.mark.parametrize(
    "path",
    ["activation_checkpointing", "checkpoint", "checkpoint.parallel_write", "data_types", "fp16",
     "zero_optimization.offload_optimizer", "optimizer.params"],
)  # fmt: skip
def test_sections_are_objects(path):
    expected = f"{path}=3 (x.json): expected an object of its keys"
    assert problems_of(in_section(path, 3)) == [expected]


def test_what_is_proven_or_harmless_is_passed_on():
    raw = {
        "zero_optimization": {
            "stage": 3,
            "round_robin_gradients": False,
            "reduce_bucket_size": 1e6,
            "use_multi_rank_bucket_allreduce": False,
            "sub_group_size": 1e9,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "param_persistence_threshold": 0,
            "memory_efficient_linear": False,
            "offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 8},
            "offload_param": {"device": "cpu", "buffer_size": 10, "max_in_cpu": 0},
        },
        "fp16": {"loss_scale": 0, "initial_scale_power": 8, "hysteresis": 1, "min_loss_scale": 1},
        "activation_checkpointing": {"cpu_checkpointing": False, "partition_activations": False},
        "checkpoint": {"tag_validation": "Fail", "parallel_write": {"pipeline_stage": False}},
    }
    config = resolve(raw)
    for section in ("zero_optimization", "activation_checkpointing", "checkpoint"):
        assert config[section] == raw[section]
    assert config["fp16"] == raw["fp16"] | {"enabled": False}


def test_the_default_of_deepspeed_for_its_float32_modules_is_its_own():
    types = {"data_types": {"keep_in_fp32_modules": "auto"}}
    assert resolve(types)["data_types"] == {"grad_accum_dtype": "fp32"}


def test_defaults_that_not_every_optimizer_takes_are_left_out():
    switches = {"adam_w_mode": True, "bias_correction": True, "maximize": False, "amsgrad": False}
    params = resolve({"optimizer": {"type": "AdamW", "params": switches}})["optimizer"]["params"]
    assert params.keys() == {"lr", "weight_decay", "betas", "eps", "torch_adam"}


def test_an_offloaded_optimizer_is_deepspeeds_own():
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    auto = {"type": "AdamW", "params": {"torch_adam": "auto", "fused": "auto"}}
    params = resolve({"zero_optimization": zero, "optimizer": auto})["optimizer"]["params"]
    assert params["torch_adam"] is False
    assert "fused" not in params
    expected = (
        'zero_optimization.offload_optimizer.device="cpu" (x.json): DeepSpeed offloads its own '
        'CPU Adam only; set optimizer.type=AdamW and torch_adam="auto", '
        "or zero_force_ds_cpu_optimizer=false"
    )
    torch_adam = {"type": "AdamW", "params": {"torch_adam": True}}
    for optimizer in (torch_adam, {"type": "SGD"}):
        assert problems_of({"zero_optimization": zero, "optimizer": optimizer}) == [expected]
        allowed = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": zero}
        assert resolve(allowed | {"optimizer": optimizer})["optimizer"]["type"] in ("AdamW", "SGD")


@pytest.mark.parametrize(("device_type", "fused"), [("cuda", True), ("cpu", False)])
def test_fused_follows_the_device(device_type, fused):
    optimizer = {"type": "AdamW", "params": {"fused": "auto"}}
    params = resolve({"optimizer": optimizer}, device_type=device_type)["optimizer"]["params"]
    assert params["fused"] is fused
    assert params["torch_adam"] is True
    optimizer["params"]["foreach"] = True  # torch runs one of them
    params = resolve({"optimizer": optimizer}, device_type=device_type)["optimizer"]["params"]
    assert params["fused"] is False


def test_another_optimizer_is_passed_on_with_our_rate():
    optimizer = {"type": "SGD", "params": {"momentum": 0.9, "weight_decay": "auto"}}
    assert resolve({"optimizer": optimizer})["optimizer"] == {
        "type": "SGD",
        "params": {"momentum": 0.9, "weight_decay": 0.1, "lr": 1e-4},
    }


def test_all_problems_come_together():
    raw = {
        "train_batch_size": 98,
        "gradient_clipping": 3,
        "amp": {"enabled": True},
        "scheduler": {},
        "schedular": {},
        "bf16": {"enabled": False, "enable": True},
        "zero_optimization": {"stage": 3, "zero_quantized_weights": True, "sub_group_size": "auto"},
        "optimizer": {"type": "Lion"},
    }
    assert len(problems_of(raw, precision="bf16")) == 10


def test_known_keys_are_those_deepspeed_reads():
    from deepspeed.runtime import constants

    names = ds_keys._words(
        "TRAIN_BATCH_SIZE OPTIMIZER SCHEDULER ZERO_ALLOW_UNTESTED_OPTIMIZER STEPS_PER_PRINT "
        "ZERO_FORCE_DS_CPU_OPTIMIZER TRAIN_MICRO_BATCH_SIZE_PER_GPU GRADIENT_ACCUMULATION_STEPS "
        "MANAGED_GRADIENT_ACCUMULATION TORCH_AUTOCAST GRADIENT_CLIPPING COMMUNICATION_DATA_TYPE "
        "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE PRESCALE_GRADIENTS GRADIENT_PREDIVIDE_FACTOR "
        "GRADIENT_ALLREDUCE_OP DISABLE_ALLGATHER DUMP_STATE DISABLE_PYTHON_GC VOCABULARY_SIZE "
        "WALL_CLOCK_BREAKDOWN MEMORY_BREAKDOWN CHECKPOINT DATA_TYPES DATALOADER_DROP_LAST "
        "USE_DATA_BEFORE_EXPERT_PARALLEL LOG_LEVEL"
    )
    assert {getattr(constants, name) for name in names} <= ds_keys.KNOWN_KEYS


def test_load_reads_an_object(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {"enabled": "auto"}}')
    assert load_ds_config(path) == {"bf16": {"enabled": "auto"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": 1,\n}', r"ds\.json line [23]: not readable as JSON: "),
        ("[1]", r"ds\.json: expected a JSON object, found list"),
        ('{"bf16": {"a": 1, "a": 2}}', r"ds\.json: .* the key 'a' stands there twice; keep one"),
    ],
)
def test_load_names_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_ds_config(path)


def test_load_missing_or_unreadable(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.json: no such DeepSpeed config file; check"):
        load_ds_config(tmp_path / "no.json")
    with pytest.raises(ConfigError, match="the DeepSpeed config cannot be read: "):
        load_ds_config(tmp_path)


@pytest.mark.parametrize("stage", [0, 1])
def test_reducing_per_chunk_needs_gradients_in_parts(stage):
    raw = {"zero_optimization": {"stage": stage}}
    ours = {"gradient_reduction": "per_chunk", "origins": {"gradient_reduction": "my.yaml"}}
    (problem,) = problems_of(raw, **ours)
    assert f"gradient_reduction=per_chunk (my.yaml): at zero_optimization.stage={stage}" in problem
    assert "use stage 2 or 3, or gradient_reduction: once" in problem
    resolve(raw, **(ours | {"gradient_reduction": "auto"}))
    resolve({"zero_optimization": {"stage": 2}}, **ours)


def test_ranks_of_a_machine_that_share_a_copy_of_the_parameters():
    zero = {"stage": 3, "zero_hpz_partition_size": 2}
    assert resolve({"zero_optimization": zero})["zero_optimization"] == zero
    (problem,) = problems_of({"zero_optimization": zero | {"zero_hpz_partition_size": 3}})
    assert problem.startswith("zero_optimization.zero_hpz_partition_size=3 (x.json): must divide")
    (problem,) = problems_of({"zero_optimization": zero | {"stage": 2}})
    assert problem.endswith("needs stage 3, not 2; remove it")
