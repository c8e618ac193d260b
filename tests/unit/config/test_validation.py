from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from vembed_ds.config.loading import parse_config
from vembed_ds.config.validation import cross_field_problems
from vembed_ds.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("{}\n")


BASE: dict[str, Any] = {"model_name": "some/model", "data_path": "train.jsonl"}


def problems_of(**values: Any) -> list[str]:
    try:
        parse_config({k: v for k, v in (BASE | values).items() if v is not ...})
    except ConfigError as error:
        return error.problems
    return []


def test_a_good_config_has_no_problems():
    assert problems_of() == []


@pytest.mark.parametrize(
    "values",
    [
        {"model_name": None, "text_model_name": "a", "image_model_name": "b"},
        {
            "model_name": None,
            "text_model_name": "a/b",
            "image_model_name": "b",
            "projection_layers": 2,
        },
        {"projection_layers": 2, "projection_dim": 8},
        {"warmup_steps": 5, "max_steps": 6},
        {"image_augmentation": [{"RandomHorizontalFlip": {"p": 0.5}}]},
        {"num_workers": 0},
        {"num_workers": 0, "persistent_workers": False},
        {"gradient_cache_chunk_size": 4},
        {"data_path": "org/data.set-1"},
        {"data_path": "."},
        {"image_root": "."},
        {"output_dir": "new/deep/folder"},
        {"eval_steps": 5, "val_data_path": ["train.jsonl"]},
        {"best_metric": "eval/recall@5", "val_data_path": "train.jsonl"},
        {
            "best_metric": "mrr_d64",
            "use_mrl": True,
            "mrl_dims": [64],
            "val_data_path": "train.jsonl",
        },
        {
            "best_metric": "train/recall@7",
            "eval_recall_k": [7],
            "datasets": [{"data_path": "train.jsonl", "val_data_path": "train.jsonl"}],
            "data_path": ...,
        },
    ],
)
def test_good_combinations(values):
    assert problems_of(**values) == []


ONLY_TOWERS = (
    "model_name='some/model': a composed encoder takes text_model_name and "
    "image_model_name only; remove model_name, or the other two and encoder_mode"
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"model_name": None},
            "model_name: no model given; set model_name, or text_model_name and image_model_name",
        ),
        (
            {"model_name": None, "text_model_name": "a"},
            "image_model_name: a composed encoder needs both towers; set image_model_name",
        ),
        (
            {"model_name": None, "image_model_name": "a"},
            "text_model_name: a composed encoder needs both towers; set text_model_name",
        ),
        (
            {"projection_layers": 2},
            "projection_layers=2: there is no projection without projection_dim; "
            "set projection_dim, or remove projection_layers",
        ),
        (
            {"warmup_steps": 6, "max_steps": 6},
            "warmup_steps=6: must be below max_steps=6; the learning rate would never be reached",
        ),
        (
            {"freeze_image_encoder": True, "image_encoder_lr": 1e-4},
            "image_encoder_lr=0.0001: has no effect with freeze_image_encoder=true; "
            "remove one of the two",
        ),
        (
            {"image_augmentation": [{"A": {}}], "retrieval_mode": "t2t"},
            "image_augmentation: retrieval_mode=t2t has no images; remove image_augmentation, "
            "or set another retrieval_mode",
        ),
        (
            {"loader_timeout_seconds": 90.0, "timeout_minutes": 1.5},
            "loader_timeout_seconds=90: must be below timeout_minutes=1.5 (90 s), or the other ranks "
            "give up first and nobody says why; lower it",
        ),
        (
            {"num_workers": 0, "prefetch_factor": 2},
            "prefetch_factor=2: has no effect with num_workers=0; "
            "remove prefetch_factor, or set num_workers above 0",
        ),
        (
            {"warmup_steps": 5, "scheduler_type": "constant"},
            "warmup_steps=5: scheduler_type=constant has no warm-up; "
            "set scheduler_type=constant_with_warmup, or remove warmup_steps",
        ),
        (
            {"num_workers": 0, "persistent_workers": True},
            "persistent_workers=True: has no effect with num_workers=0; "
            "remove persistent_workers, or set num_workers above 0",
        ),
        (
            {"eval_steps": 5},
            "eval_steps=5: there is nothing to evaluate on; set val_data_path, or eval_steps=0",
        ),
        ({"eval_recall_k": [1, 5, 1]}, "eval_recall_k=[1, 5, 1]: 1 stands there twice; keep one"),
        ({"data_path": "no.jsonl"}, "data_path='no.jsonl': no such file; check the path"),
        (
            {"val_data_path": ["train.jsonl", "x/y/no.csv"]},
            "val_data_path='x/y/no.csv': no such file; check the path",
        ),
        (
            {"data_path": "a/b/c"},
            "data_path='a/b/c': no such folder; give a file (.jsonl, .json, .csv, .tsv, .parquet, .tar), "
            "a folder or a hub name",
        ),
        ({"image_root": "pics"}, "image_root='pics': no such folder; check the path"),
        (
            {"output_dir": "train.jsonl"},
            "output_dir='train.jsonl': train.jsonl is a file; give a folder",
        ),
        (
            {"output_dir": "~/runs/1"},
            "output_dir='~/runs/1': only a shell replaces ~; write the whole path",
        ),
    ],
)
def test_each_problem_by_its_message(values, expected):
    assert problems_of(**values) == [expected]


STREAM = {"streaming": True, "max_steps": 5}


@pytest.mark.parametrize(
    "values",
    [
        STREAM,
        STREAM | {"shuffle_buffer": 1, "val_data_path": "train.jsonl", "eval_steps": 5},
        STREAM | {"freeze_text_encoder": True, "cache_frozen_encoder": False},
        STREAM | {"freeze_image_encoder": True},
        STREAM | {"data_path": ["train.jsonl", "org/data"], "mask_duplicates": True},
        {"streaming": False, "shuffle_buffer": 10_000},
    ],
)
def test_good_streams(values):
    assert problems_of(**values) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"max_steps": None, "epochs": 2},
            "streaming=True: how many records there are is not known, so epochs cannot be planned; "
            "set max_steps",
        ),
        (
            {"no_duplicates": True},
            "no_duplicates=True: compares all records before training, which streaming does not "
            "read; remove one of the two (mask_duplicates works)",
        ),
        (
            {"on_bad_record": "skip"},
            "on_bad_record='skip': tries all records before training, which streaming does not "
            "read; set on_bad_record: fail, or streaming: false",
        ),
        (
            {"data_path": ..., "datasets": [{"data_path": "train.jsonl"}, {"data_path": "a/b"}]},
            "datasets: are mixed by their numbers of records, which streaming does not know; give "
            "one data_path, which may be a list, or set streaming: false",
        ),
        (
            {"freeze_text_encoder": True},
            "cache_frozen_encoder=True: computes the features of all texts before training, which "
            "streaming does not read; set cache_frozen_encoder: false, or streaming: false",
        ),
        (
            {"guide_model_name": "some/guide"},
            "guide_model_name='some/guide': embeds all items before training, which streaming does "
            "not read; remove it, or set streaming: false",
        ),
        (
            {"streaming": False, "shuffle_buffer": 5},
            "shuffle_buffer=5: has no effect without streaming; remove it, or set streaming: true",
        ),
    ],
)
def test_what_a_stream_cannot_do(values, expected):
    assert problems_of(**(STREAM | values)) == [expected]


def test_composed_without_towers_names_both():
    found = problems_of(encoder_mode="composed")
    assert found == [
        "text_model_name: a composed encoder needs both towers; set text_model_name",
        "image_model_name: a composed encoder needs both towers; set image_model_name",
        ONLY_TOWERS,
    ]


def test_empty_and_unknown_data_files():
    Path("empty.parquet").touch()
    Path("train.txt").write_text("x")
    assert problems_of(data_path=["empty.parquet", "train.txt"]) == [
        "data_path='empty.parquet': the file is empty; give a file with records",
        "data_path='train.txt': unknown file type; expected one of .jsonl, .json, .csv, .tsv, .parquet, .tar",
    ]


def test_output_below_a_file_and_in_a_read_only_folder(monkeypatch):
    (problem,) = problems_of(output_dir="train.jsonl/run")
    assert problem.startswith("output_dir='train.jsonl/run': ")
    assert problem.endswith("train.jsonl is a file; give a folder")
    # Tests may run as root, who can write anywhere.
    monkeypatch.setattr(os, "access", lambda *_: False)
    (problem,) = problems_of(output_dir="run")
    assert problem == f"output_dir='run': cannot write in {Path.cwd()}; give another folder"


def test_rules_on_invalid_keys_are_skipped():
    config = parse_config(BASE)
    broken = config.model_copy(
        update={"run": config.run.model_copy(update={"eval_recall_k": (1, 1)})}
    )
    assert len(cross_field_problems(broken)) == 1
    assert cross_field_problems(broken, skip={"eval_recall_k"}) == []


def test_several_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text("{}\n")

    def problems(**values: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            parse_config({"model_name": "some/model", **values})
        return caught.value.problems

    a, b = {"data_path": "a.jsonl"}, {"data_path": "b.jsonl", "weight": 0.5}
    config = parse_config({"model_name": "some/model", "datasets": [a, b]})
    assert [entry.weight for entry in config.data.datasets] == [1.0, 0.5]
    assert problems(data_path="a.jsonl", datasets=[a, b]) == [
        "data_path='a.jsonl': stands beside datasets; keep one of the two"
    ]
    assert problems(datasets=[a, a]) == [
        "datasets: 'a' stands there twice; give each a name of its own"
    ]
    assert problems(datasets=[a, {"data_path": "c.jsonl"}]) == [
        "datasets[1].data_path='c.jsonl': no such file; check the path"
    ]
    assert problems(data_path="a.jsonl", batching="homogeneous") == [
        "batching='homogeneous': there is only one data set; remove batching, or list several "
        "under datasets"
    ]
    assert problems(datasets=[a, b | {"loss": {"temperature": 0.1}}]) == [
        "datasets[1].loss: a loss of its own needs batches of its own; set batching: "
        "homogeneous, or remove it"
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"use_lora": True, "use_dora": True, "lora_alpha": 16, "lora_target_modules": ["q_proj"]},
        {"use_lora": True, "lora_target_modules": "all-linear", "lora_modules_to_save": ["pooler"]},
        {"use_lora": True, "gradient_checkpointing": True},
        {"use_lora": True, "activation_checkpointing": "deepspeed"},
        {"lora_r": 8, "lora_target_modules": ["query"]},  # as in vembed-factory's files
        {"load_in_4bit": False},
        {"use_lora": True, "load_in_4bit": True, "precision": "bf16"},
    ],
)
def test_good_adapters(values):
    assert problems_of(**values) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"use_dora": True}, "use_dora=True: has no effect without use_lora; set use_lora: true"),
        ({"use_rslora": True}, "use_rslora=True: has no effect without use_lora; set use_l"),
        (
            {"lora_modules_to_save": ["pooler"]},
            "lora_modules_to_save=['pooler']: has no effect without use_lora; set use_lora: true",
        ),
        (
            {
                "use_lora": True,
                "gradient_checkpointing": True,
                "activation_checkpointing": "deepspeed",
            },
            "activation_checkpointing=deepspeed: with use_lora no input of the first layer needs "
            "a gradient, and this mechanism would give its adapters none; use huggingface",
        ),
    ],
)
def test_adapter_keys_that_do_nothing_or_harm(values, problem):
    (found,) = problems_of(**values)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"gradient_checkpointing": False}, "has no effect without gradient_checkpointing; set"),
        ({"activation_checkpointing": "deepspeed"}, "slices have a mechanism of their own; remove"),
        ({"use_lora": True}, "with use_lora it was not compared with the reference; remove it"),
    ],
)
def test_layers_in_slices(values, problem):
    good = {"gradient_checkpointing": True, "gradient_checkpointing_slice_size": 4}
    assert problems_of(**good) == []
    (found,) = problems_of(**(good | values))
    assert found.startswith(f"gradient_checkpointing_slice_size=4: {problem}")


@pytest.mark.parametrize("key", ["use_lora", "gradient_checkpointing"])
def test_what_was_not_compiled_in_any_test_is_refused(key):
    (found,) = problems_of(**{key: True}, use_torch_compile=True)
    assert found == f"use_torch_compile=True: is not offered with {key}; remove one of the two"


@pytest.mark.parametrize("reduction", ["per_chunk", "auto"])
def test_reducing_per_chunk_needs_gradients_in_one_piece(reduction):
    values = {"gradient_reduction": reduction, "activation_checkpointing": "deepspeed"}
    assert problems_of(**values) == []
    (found,) = problems_of(**values, gradient_checkpointing=True)
    assert found.startswith(f"gradient_reduction={reduction}: activation_checkpointing=deepspeed")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_r": 0}, "lora_r=0"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_target_modules": []}, "lora_target_modules"),
        ({"lora_target_modules": "all_linear"}, "lora_target_modules"),
    ],
)
def test_adapter_values_out_of_range(values, words):
    (found,) = problems_of(use_lora=True, **values)
    assert words in found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"use_dora": True},
            "load_in_4bit=True: with use_dora it was not compared with the reference; remove one",
        ),
        (
            {"precision": "fp16"},
            "load_in_4bit=True: with precision=fp16 it was not compared with the reference; use bf16",
        ),
        ({"use_lora": False}, "load_in_4bit=True: has no effect without use_lora; set use_lora"),
    ],
)
def test_4_bit_with_what_was_not_compared(values, message):
    (found,) = problems_of(**{"use_lora": True, "load_in_4bit": True, **values})
    assert message in found


def test_a_data_sets_own_loss_is_checked_as_the_shared_one(tmp_path: Path) -> None:
    Path("b.jsonl").write_text("{}\n")

    def parse(loss: dict[str, Any], **more: Any) -> Any:
        entries = [{"data_path": "train.jsonl"}, {"data_path": "b.jsonl", "loss": loss}]
        values = {"model_name": "some/model", "datasets": entries, "batching": "homogeneous"}
        return parse_config(values | more)

    parse({"loss_type": "in_batch_hard", "hard_topk": 4})  # vembed-factory's name of the key
    parse({"loss_type": "colbert"}, pooling_method="none")
    for loss, message in (
        (
            {"loss_type": "colbert"},
            r"datasets\[1\].loss: loss_type=colbert .* pooling_method: none",
        ),
        ({"temprature": 0.1}, r"datasets\[1\].loss: temprature=0.1: "),
        ({"temperature": -1.0}, r"datasets\[1\].loss: temperature=-1.0: "),
        (
            {"loss_type": "triplet", "negatives_scope": "own"},
            r"datasets\[1\].loss: negatives_scope",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(loss)


@pytest.mark.parametrize("mode", ["m2t", "t2x"])
def test_inner_layers_of_items_of_both_kinds_are_refused(mode: str) -> None:
    values = BASE | {"use_mrl": True, "mrl_layers": [1, 2], "retrieval_mode": mode}
    with pytest.raises(ConfigError, match=f"mrl_layers=.*not offered with retrieval_mode={mode}"):
        parse_config(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"best_metric": "mrr"},
            "best_metric='mrr': there is nothing to evaluate on; set val_data",
        ),
        (
            {"best_metric": "recall@50", "val_data_path": "train.jsonl"},
            "best_metric='recall@50': the evaluation gives no such metric; the nearest is recall@5 "
            "(also known: recall@1, recall@10, mrr)",
        ),
        (
            {"best_metric": "num_queries", "val_data_path": "train.jsonl"},
            "best_metric='num_queries': the evaluation gives no such metric",
        ),
        (
            {"save_epochs": 1, "streaming": True, "max_steps": 5},
            "save_epochs=1: streaming does not know when an epoch ends; set save_steps instead",
        ),
    ],
)
def test_when_checkpoints_are_saved(values: dict[str, Any], message: str) -> None:
    (problem,) = problems_of(**values)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("guide_model_name='some/guide'", {"guide_model_name": "some/guide"}),
        ("cache_frozen_encoder=True", {"freeze_text_encoder": True}),
        ("cache_frozen_encoder=True", {"freeze_image_encoder": True}),
        (
            "teacher_mode='cached'",
            {
                "teacher_model_name": "some/teacher",
                "teacher_mode": "cached",
                "distillation_alpha": 0.5,
            },
        ),
    ],
)
def test_what_all_ranks_read_needs_a_shared_folder(key: str, values: dict[str, Any]) -> None:
    assert problems_of(**values) == []
    (problem,) = problems_of(node_local_output=True, **values)
    assert problem == (
        f"node_local_output=True: {key} stores vectors that all ranks read; give a shared "
        f"output_dir, or change {key.partition('=')[0]}"
    )


@pytest.mark.parametrize(
    "values",
    [
        {"freeze_text_encoder": True, "frozen_features_dir": "shared"},
        {
            "freeze_image_encoder": True,
            "image_augmentation": [{"RandomHorizontalFlip": {"p": 0.5}}],
        },
        {"freeze_image_encoder": True, "streaming": True, "max_steps": 5},
    ],
)
def test_features_that_are_kept_elsewhere_or_not_at_all_need_no_shared_folder(
    values: dict[str, Any],
) -> None:
    assert problems_of(node_local_output=True, **values) == []


@pytest.mark.parametrize(
    "values", [{}, {"freeze_image_encoder": True, "cache_frozen_encoder": False}]
)
def test_a_folder_for_features_that_nobody_computes(values: dict[str, Any]) -> None:
    assert problems_of(frozen_features_dir="there", **values) == [
        "frozen_features_dir='there': nothing would be kept there; set freeze_text_encoder or "
        "freeze_image_encoder, and cache_frozen_encoder, or remove it"
    ]


def test_tokens_follow_from_chunks_that_are_chosen():
    automatic = {"gradient_cache_chunk_size": "auto", "use_gradient_cache": True}
    assert problems_of(**automatic) == []
    (found,) = problems_of(**automatic, gradient_cache_chunk_tokens=512)
    assert found.startswith("gradient_cache_chunk_tokens=512: with gradient_cache_chunk_size=auto")
