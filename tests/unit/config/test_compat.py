"""Every key of vembed-factory is accepted with its meaning, or with a notice of what applies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vembed_ds.config.compat import ENCODER_FAMILIES, family_problem
from vembed_ds.config.loading import config_notices, load_config, parse_config
from vembed_ds.config.schema import SECTION_OF
from vembed_ds.config.yaml_text import dump_yaml
from vembed_ds.errors import ConfigError

BASE: dict[str, Any] = {"model_name": "some/model", "data_path": "some/data"}

# Key: (a value that vembed-factory takes, the key here, its value here).
MEANT: dict[str, tuple[Any, str, Any]] = {
    "model_name": ("a/b", "model_name", "a/b"),
    "model_name_or_path": ("a/b", "model_name", "a/b"),
    "encoder_mode": ("qwen3_embedding", "encoder_mode", "qwen3_embedding"),
    "text_model_name": ("a/b", "text_model_name", "a/b"),
    "image_model_name": ("a/b", "image_model_name", "a/b"),
    "projection_dim": (256, "projection_dim", 256),
    "projection_layers": (2, "projection_layers", 2),
    "pooling_method": ("last_token", "pooling_method", "last_token"),
    "torch_dtype": ("bfloat16", "precision", "bf16"),
    "attn_implementation": ("sdpa", "attn_implementation", "sdpa"),
    "max_seq_length": (77, "max_seq_length", 77),
    "gradient_checkpointing": (True, "gradient_checkpointing", True),
    "data_path": ("c/d", "data_path", "c/d"),
    "val_data_path": ("c/d", "val_data_path", "c/d"),
    "image_root": (".", "image_root", "."),
    "column_mapping": ({"query": "caption"}, "column_mapping", {"query": "caption"}),
    "retrieval_mode": ("i2t", "retrieval_mode", "i2t"),
    "num_workers": (3, "num_workers", 3),
    "pin_memory": (False, "pin_memory", False),
    "prefetch_factor": (5, "prefetch_factor", 5),
    "persistent_workers": (False, "persistent_workers", False),
    "output_dir": ("some_output", "output_dir", "some_output"),
    "batch_size": (7, "batch_size", 7),
    "learning_rate": (3e-4, "lr", 3e-4),
    "lr": (3e-4, "lr", 3e-4),
    "epochs": (5, "epochs", 5),
    "loss_type": ("infonce", "loss_type", "infonce"),
    "loss_bidirectional": (True, "loss_bidirectional", True),
    "temperature": (0.2, "temperature", 0.2),
    "teacher_model_name": ("a/b", "teacher_model_name", "a/b"),
    "distillation_alpha": (0.7, "distillation_alpha", 0.7),
    "distillation_temperature": (2.0, "distillation_temperature", 2.0),
    "distillation_loss_type": ("mse", "distillation_loss_type", "mse"),
    "use_gradient_cache": (True, "use_gradient_cache", True),
    "gradient_cache_chunk_size": (3, "gradient_cache_chunk_size", 3),
    "report_to": ("wandb", "report_to", "wandb"),
    "run_name": ("x", "run_name", "x"),
    "save_steps": (9, "save_steps", 9),
    "logging_steps": (9, "logging_steps", 9),
    "eval_batch_size": (9, "eval_batch_size", 9),
    "weight_decay": (0.2, "weight_decay", 0.2),
    "max_grad_norm": (0, "max_grad_norm", 0),
    "scheduler_type": ("linear", "scheduler_type", "linear"),
    "warmup_ratio": (0.2, "warmup_ratio", 0.2),
    "warmup_steps": (4, "warmup_steps", 4),
    "use_lora": (True, "use_lora", True),
    "lora_r": (4, "lora_r", 4),
    "lora_alpha": (4, "lora_alpha", 4),
    "lora_dropout": (0.2, "lora_dropout", 0.2),
    "lora_target_modules": (["q_proj"], "lora_target_modules", ("q_proj",)),
    "topk_tokens": (32, "topk_tokens", 32),
    "prompt": ("Describe this image.", "prompt", "Describe this image."),
    "use_mrl": (True, "use_mrl", True),
    "mrl_dims": ([64, 32], "mrl_dims", (64, 32)),
    "mrl_weights": ([1.0, 0.5], "mrl_weights", (1.0, 0.5)),
    "triplet_margin": (0.3, "triplet_margin", 0.3),
    "cosent_scale": (10.0, "cosent_scale", 10.0),
    "init_logit_scale": (2.0, "init_logit_scale", 2.0),
    "init_logit_bias": (-5.0, "init_logit_bias", -5.0),
    "hard_mining_topk": (8, "hard_mining_topk", 8),
    "hard_topk": (8, "hard_mining_topk", 8),
    "use_all_negatives": (True, "use_all_negatives", True),
}

# Values beyond those above, by key.
VALUES = {
    "loss_type": [
        "infonce",
        "sigmoid",
        "triplet",
        "cosent",
        "colbert",
        "in_batch_hard",
        "hard_negative",
    ],
    "retrieval_mode": ["t2i", "i2i", "i2t", "t2t", "m2i", "m2t"],
    "pooling_method": ["cls", "mean", "last_token", "none"],
    "attn_implementation": ["sdpa", "eager"],
    "scheduler_type": [
        *("cosine", "linear", "constant", "constant_with_warmup"),
        *("cosine_with_restarts", "polynomial", "inverse_sqrt"),
    ],
    "report_to": ["none", "wandb", "tensorboard", "swanlab", "all"],
}

NOTICED: dict[str, Any] = {
    "model_type": "custom",
    "overwrite_output_dir": True,
    "save_strategy": "epoch",
    "max_image_size": 224,
    "fp16": True,
    "enable_gather": True,
    "use_fsdp": True,
    "num_gpus": 2,
    "ddp_find_unused_parameters": False,
    "debug_gpu_memory": 24,
    "enable_image_cache": True,
    "validate_data": True,
    "skip_invalid_records": True,
    "project": "mine",
    "logging_dir": "logs",
    "resume": "auto",
    "query_column": "caption",
    "positive_column": "image",
    "negative_column": "other",
    "enable_hard_mining": True,
    "hard_mining_mode": "in_batch",
    "hard_mining_lambda": 0.3,
    "hard_mining_temperature": 0.07,
    "hard_mining_bank_size": 65536,
    "hard_mining_bank_momentum": 0.999,
    "bank_size": 1,
    "bank_dim": 1,
    "bank_momentum": 0.9,
    "lambda_bank": 0.1,
}
# Key: (the value at which it is off, one at which it is refused).
REFUSED: dict[str, tuple[Any, Any]] = {
    "dry_run": (False, True),
}


def _values() -> list[str]:
    return [f"{key}={value}" for key, values in VALUES.items() for value in values]


def notices_of(values: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(dump_yaml(values))
    load_config(path)
    return config_notices(path)


def problems_of(values: dict[str, Any], **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config({**BASE, **values}, origin="f", **more)
    return caught.value.problems


@pytest.mark.parametrize("key", list(MEANT))
def test_a_key_with_a_meaning_has_it(key: str, tmp_path: Path) -> None:
    given, name, value = MEANT[key]
    values = {**BASE, key: given}
    if key == "projection_layers":
        values["projection_dim"] = 8
    if key.startswith("distillation"):
        values["teacher_model_name"] = "a/b"
    if key == "topk_tokens":
        values["pooling_method"] = "none"
    if key in ("text_model_name", "image_model_name"):
        values |= {"text_model_name": "t", "image_model_name": "i", key: given}
        del values["model_name"]
    if key == "model_name_or_path":
        del values["model_name"]
    notices = notices_of(values, tmp_path)
    assert parse_config(values)[name] == value
    assert notices == []


@pytest.mark.parametrize("choice", _values())
def test_a_value_of_its_is_accepted(choice: str) -> None:
    key, _, value = choice.partition("=")
    assert parse_config({**BASE, key: value})[key] == value


@pytest.mark.parametrize("key", NOTICED)
def test_an_ignored_key_is_accepted_with_one_line(key: str, tmp_path: Path) -> None:
    (notice,) = notices_of({**BASE, key: NOTICED[key]}, tmp_path)
    place = f"{key}={NOTICED[key]!r} ({tmp_path / 'run.yaml'}): "
    assert notice.startswith(place)
    assert len(notice) > len(place) + 20
    assert "\n" not in notice
    assert notices_of({**BASE, key: None}, tmp_path) == []
    assert key not in SECTION_OF, "a key with a field of its own cannot be ignored"
    assert parse_config({**BASE, key: NOTICED[key]}) == parse_config(BASE)


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_there_is_refused_by_name_unless_it_is_off(key: str, tmp_path: Path) -> None:
    off, on = REFUSED[key]
    assert notices_of({**BASE, key: off}, tmp_path) == []
    (problem,) = problems_of({key: on})
    assert problem.startswith(f"{key}={on!r} (f): ")


def test_what_examples_alone_had_says_so(tmp_path: Path) -> None:
    (notice,) = notices_of({**BASE, "hard_mining_bank_size": 9}, tmp_path)
    assert "its code never had what it names and ignored it" in notice


def test_the_defaults_that_its_files_rely_on() -> None:
    """configs/defaults.yaml, as it took effect (VEMBED_SPEC.md, section 2)."""
    config = parse_config(BASE)
    effective = {
        "encoder_mode": "auto",
        "projection_dim": None,
        "attn_implementation": None,
        "precision": "fp32",
        "val_data_path": None,
        "image_root": "",
        "column_mapping": {},
        "retrieval_mode": "t2i",
        "num_workers": 4,
        "pin_memory": True,
        "prefetch_factor": 2,
        "persistent_workers": True,
        "output_dir": "output",
        "batch_size": 32,
        "lr": 2e-5,
        "epochs": 3,
        "loss_type": "infonce",
        "loss_bidirectional": False,
        "temperature": 0.05,
        "teacher_model_name": None,
        "distillation_alpha": 0.5,
        "distillation_temperature": 1.0,
        "distillation_loss_type": "kl",
        "use_gradient_cache": False,
        "gradient_cache_chunk_size": 8,
        "gradient_checkpointing": False,
        "save_steps": 0,
        "logging_steps": 10,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "warmup_steps": 0,
    }
    assert {key: config[key] for key in effective} == effective


@pytest.mark.parametrize(
    ("written", "precision"),
    [
        ("float16", "fp16"),
        ("fp16", "fp16"),
        ("bfloat16", "bf16"),
        ("bf16", "bf16"),
        ("float32", "fp32"),
        ("fp32", "fp32"),
        (None, "fp32"),
        ("auto", "fp32"),
    ],
)
def test_torch_dtype_is_the_precision(written: str | None, precision: str) -> None:
    assert parse_config({**BASE, "torch_dtype": written}).model.precision == precision
    assert parse_config({**BASE, "precision": "bf16", "torch_dtype": None})["precision"] == "bf16"


def test_torch_dtype_is_wrong_or_contradicts() -> None:
    assert problems_of({"torch_dtype": "int8"}) == [
        "torch_dtype='int8' (f): expected fp32 or bf16 or fp16"
    ]
    assert problems_of({"torch_dtype": "bfloat16", "precision": "fp32"}) == [
        "torch_dtype='bfloat16' and precision='fp32' (f): one setting with two values; keep one"
    ]
    config = parse_config({**BASE, "torch_dtype": "bf16"}, overrides=["precision=fp32"])
    assert config.model.precision == "fp32"


def test_two_learning_rates_are_named_unless_they_agree() -> None:
    assert problems_of({"lr": 2e-5, "learning_rate": 1e-4}) == [
        "lr=2e-05 and learning_rate=0.0001 (f): one setting with two values; keep one"
    ]
    assert parse_config({**BASE, "lr": 1e-4, "learning_rate": 1e-4})["learning_rate"] == 1e-4


def test_nulls_of_the_file_that_its_command_wrote() -> None:
    """``.train_config.yaml`` has every key, null where nothing was given."""
    nulls = dict.fromkeys(["lr", "image_root", "column_mapping", "model_name_or_path", "report_to"])
    config = parse_config({**BASE, **nulls, "learning_rate": 1e-4})
    assert (config["lr"], config["image_root"], config["column_mapping"]) == (1e-4, "", {})
    assert config["model_name"] == BASE["model_name"]
    assert config["report_to"] == "none"
    swapped = parse_config({**BASE, "learning_rate": 1e-4, "lr": None})
    assert swapped["lr"] == 1e-4
    assert parse_config({**BASE, "image_root": "."}, overrides=["image_root=null"])[
        "image_root"
    ] == ""  # fmt: skip


def test_a_composed_encoder_may_come_with_the_model_name_it_does_not_use(tmp_path: Path) -> None:
    values = {**BASE, "text_model_name": "t", "image_model_name": "i"}
    (notice,) = notices_of(values, tmp_path)
    assert notice.startswith(f"model_name='some/model' ({tmp_path / 'run.yaml'}): not used")
    assert parse_config(values).model.model_name is None


def test_colbert_needs_token_embeddings_whatever_the_pooling_says(tmp_path: Path) -> None:
    values = {**BASE, "loss_type": "colbert", "topk_tokens": 8}
    assert notices_of(values, tmp_path) == []
    assert parse_config(values)["pooling_method"] == "none"
    (notice,) = notices_of({**values, "pooling_method": "cls"}, tmp_path)
    assert notice.endswith("loss_type='colbert' needs pooling_method='none'")
    assert parse_config({**values, "pooling_method": "cls"})["pooling_method"] == "none"


def test_the_flash_package_becomes_sdpa_and_says_so(tmp_path: Path) -> None:
    values = {**BASE, "attn_implementation": "flash_attention_2"}
    (notice,) = notices_of(values, tmp_path)
    assert notice.startswith("attn_implementation='flash_attention_2' (")
    assert "sdpa is used" in notice
    assert parse_config(values)["attn_implementation"] == "sdpa"
    overridden = parse_config(BASE, overrides=["attn_implementation=flash_attention_2"])
    assert overridden["attn_implementation"] == "sdpa"


def test_overrides_are_translated_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(BASE))
    overrides = ["torch_dtype=bf16", "use_fsdp=true"]
    assert load_config(path, overrides)["precision"] == "bf16"
    (notice,) = config_notices(path, overrides)
    assert notice.startswith("use_fsdp=True (--config_override): there is no FSDP here")


@pytest.mark.parametrize("mode", ["auto", "composed", *ENCODER_FAMILIES])
def test_every_encoder_mode_is_accepted(mode: str) -> None:
    values = {**BASE, "encoder_mode": mode}
    if mode == "composed":
        values |= {"text_model_name": "t", "image_model_name": "i"}
    assert parse_config(values)["encoder_mode"] == mode


def test_a_family_that_contradicts_the_model_names_both() -> None:
    problem = family_problem("clip", model_type="bert", kind="text")
    assert problem is not None
    assert problem.startswith(
        "encoder_mode=clip: names a model with a text and an image tower, "
        "but the model is of model_type=bert, a text encoder; "
    )
    for mode in ("auto", "composed", "bge", "qwen"):
        assert family_problem(mode, model_type="bert", kind="text") is None


def test_the_config_answers_like_a_mapping() -> None:
    config = parse_config({**BASE, "batch_size": 7})
    assert config["batch_size"] == config.get("batch_size", 1) == 7
    assert config["learning_rate"] == config["lr"]
    assert "batch_size" in config
    assert "bank_size" not in config
    assert config.get("bank_size") is None
    with pytest.raises(KeyError):
        config["bank_size"]
    values = config.flat()
    values["batch_size"] = 9
    assert parse_config(values)["batch_size"] == 9
