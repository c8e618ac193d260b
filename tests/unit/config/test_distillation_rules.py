from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vembed_ds.config.distillation import DistillationConfig, teacher_entries
from vembed_ds.config.loading import parse_config
from vembed_ds.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("{}\n")


BASE: dict[str, Any] = {"model_name": "some/model", "data_path": "train.jsonl"}
TEACHER = {"teacher_model_name": "a/b"}
LAYERS = {"use_mrl": True, "mrl_layers": [1, 2]}
SCRATCH = {"config": {"model_type": "bert"}}


def problems_of(**values: Any) -> list[str]:
    try:
        parse_config(BASE | values)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "values",
    [
        TEACHER,
        {"teacher_ema_decay": 0.99, "distillation_alpha": 0.0},
        {"teacher_scores": True, "distillation_loss_type": "margin_mse"},
        TEACHER | {"teacher_scores": True, "teacher_temperature": 2.0},
        TEACHER | {"teacher_mode": "cached", "teacher_cache": "there"},
        {"teachers": [{"model_name": "a/b", "mode": "first_epoch"}, {"scores": True}]},
        TEACHER | {"distillation_alpha_schedule": "linear", "distillation_alpha_end": 1.0},
        TEACHER | {"distillation_loss_type": "rank", "distillation_scale": 5.0},
        TEACHER | {"streaming": True, "max_steps": 5},
    ],
)
def test_good_combinations(values: dict[str, Any]) -> None:
    assert problems_of(**values) == []


def test_every_teacher_has_a_name_and_what_is_set_for_all() -> None:
    config = parse_config(
        BASE
        | {"teacher_mode": "cached", "teacher_precision": "bf16"}
        | {
            "teachers": [
                {"model_name": "org/big_model", "weight": 2},
                {"model_name": {**SCRATCH, "processor": "."}, "mode": "live"},
                {"ema_decay": 0.9},
                {"scores": True, "temperature": 3},
            ]
        }
    )
    found = teacher_entries(config.distillation)
    package = {"teacher_model_name": "package:vembed_ds/model"}
    assert [e.name for e in teacher_entries(DistillationConfig.model_validate(package))] == [
        "vembed_ds"
    ]
    assert [(e.name, e.mode, e.precision, e.weight) for e in found[:2]] == [
        ("big_model", "cached", "bf16", 2.0),
        ("bert", "live", "bf16", 1.0),
    ]
    assert [e.name for e in found[2:]] == ["ema", "scores"]
    assert [e.temperature for e in found] == [None, None, None, 3.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"distillation_alpha": 0.7},
            "distillation_alpha=0.7: there is no teacher; set teacher_model_name, "
            "teacher_ema_decay, teacher_scores or teachers, or remove distillation_alpha",
        ),
        (
            {"teacher_mode": "cached"},
            "teacher_mode='cached': there is no teacher; set teacher_model_name, "
            "teacher_ema_decay, teacher_scores or teachers, or remove teacher_mode",
        ),
        (
            TEACHER | {"teachers": [{"scores": True}]},
            "teacher_model_name='a/b': stands beside teachers; make it one of the list",
        ),
        (
            TEACHER | {"distillation_alpha_end": 1.0},
            "distillation_alpha_end=1: distillation_alpha_schedule=constant never gets there; set "
            "it to linear or cosine, or remove distillation_alpha_end",
        ),
        (
            TEACHER | {"distillation_alpha_schedule": "cosine"},
            "distillation_alpha_schedule=cosine: where to is not said; set distillation_alpha_end",
        ),
        (
            TEACHER | {"distillation_alpha": 1},
            "distillation_alpha=1: is the share of the task, so the teacher would have none; lower "
            "it, or remove the teacher",
        ),
        (
            TEACHER | {"distillation_scale": 5.0},
            "distillation_scale=5.0: distillation_loss_type=kl does not use it; remove "
            "distillation_scale, or set distillation_loss_type: rank",
        ),
        (
            {
                "teachers": [{"scores": True}, {"model_name": "a/b", "temperature": 2.0}],
                "distillation_loss_type": "rank",
            },
            "teachers[1].temperature=2.0: distillation_loss_type=rank does not use it; remove "
            "teachers[1].temperature, or set distillation_loss_type: kl",
        ),
        (
            {"teachers": [{"model_name": "a/b", "scores": True}]},
            "teachers[0]: expected one of model_name, ema_decay and scores, found model_name and "
            "scores; give one",
        ),
        (
            {"teachers": [{"weight": 2}]},
            "teachers[0]: expected one of model_name, ema_decay and scores, found none of them; "
            "give one",
        ),
        (
            {"teachers": [{"scores": True, "precision": "bf16"}]},
            "teachers[0].precision='bf16': has no effect with scores; remove it",
        ),
        (
            {"teachers": [{"ema_decay": 0.9, "mode": "cached"}]},
            "teachers[0].mode='cached': has no effect with ema_decay; remove it",
        ),
        (
            {"teacher_scores": True, "distillation_loss_type": "regression"},
            "distillation_loss_type=regression: teacher 'scores' gives scores, and this loss "
            "compares embeddings; choose another loss",
        ),
        (
            {"teachers": [{"model_name": "a/b"}, {"model_name": "a/c"}]}
            | {"pooling_method": "none", "distillation_loss_type": "regression"},
            "distillation_loss_type=regression: compares one vector per item, and "
            "pooling_method=none gives one per token; choose another loss",
        ),
        (
            {"teacher_ema_decay": 0.9, "use_lora": True, "load_in_4bit": True},
            "load_in_4bit=True: a student in 4 bit was not compared with the reference beside a "
            "teacher; remove one of them",
        ),
        (
            {"teacher_ema_decay": 0.9, "precision": "fp16"},
            "precision=fp16: an average of the student was not compared with the reference where "
            "steps may be skipped; use bf16 or fp32, or another teacher",
        ),
        (
            {"teacher_ema_decay": 0.9, "use_mrl": True, "mrl_layers": [1, 2]},
            "mrl_layers=[1, 2]: an average of the student was not compared with the reference over "
            "several layers; remove mrl_layers, or choose another teacher",
        ),
        (
            {"teacher_ema_decay": 0.9, "data_path": None, "batching": "homogeneous"}
            | {
                "datasets": [
                    {"name": name, "data_path": "train.jsonl", "loss": LAYERS}
                    for name in ("a", "b")
                ]
            },
            "mrl_layers=[1, 2]: an average of the student was not compared with the reference over "
            "several layers; remove mrl_layers, or choose another teacher",
        ),
        (
            {"teachers": [{"scores": True}, {"model_name": "./nope"}]},
            "teachers[1].model_name='./nope': no such folder; check the path, or give a hub name or "
            "package:NAME/folder",
        ),
        (
            {"teacher_model_name": "./nope"},
            "teacher_model_name='./nope': no such folder; check the path, or give a hub name or "
            "package:NAME/folder",
        ),
        (
            {"teacher_model_name": SCRATCH},
            "teacher_model_name: a model that starts from random weights brings no processor; name a "
            "folder with one under processor",
        ),
        (
            TEACHER | {"streaming": True, "max_steps": 5, "teacher_mode": "cached"},
            "teacher_mode=cached: embeds every item once, and streaming does not know them all; "
            "set it to live, or streaming: false",
        ),
        (
            TEACHER | {"teacher_ds_config": "nope.json"},
            "teacher_ds_config='nope.json': no such file; check the path",
        ),
        (
            {"teachers": [{"model_name": "a/b"}, {"model_name": "c/b"}]},
            "teachers: 'b' stands there twice; give each a name of its own",
        ),
        (
            {"teachers": [{"model_name": "a/b", "name": "a/b"}]},
            "teachers: the name 'a/b' is that of a folder too; use letters, digits, - and _",
        ),
        (
            {"teachers": [{"model_name": "a/b", "name": ".."}]},
            "teachers: the name '..' is that of a folder too; use letters, digits, - and _",
        ),
        (
            {"teachers": [{"ema_decay": 0.9}, {"ema_decay": 0.99, "name": "slow"}]},
            "teachers: a checkpoint holds one average of the student; keep one ema_decay",
        ),
        (
            {"teacher_ema_decay": 0.9, "teacher_ds_config": "nope.json"},
            "teacher_ds_config='nope.json': no such file; check the path",
        ),
        (
            {"teacher_ema_decay": 0.9, "teacher_precision": "bf16"},
            "teacher_precision='bf16': no teacher is a model that reads it; remove teacher_precision",
        ),
        (
            {"teacher_scores": True, "teacher_ds_config": "train.jsonl"},
            "teacher_ds_config='train.jsonl': no teacher is a model that reads it; remove "
            "teacher_ds_config",
        ),
        (
            TEACHER | {"teacher_cache": "there"},
            "teacher_cache='there': no teacher is cached; set teacher_mode: cached or first_epoch, "
            "or remove teacher_cache",
        ),
    ],
)
def test_what_contradicts_itself_is_named(values: dict[str, Any], expected: str) -> None:
    assert problems_of(**values) == [expected]


def test_an_unknown_loss_is_named() -> None:
    (problem,) = problems_of(**TEACHER, distillation_loss_type="kld")
    assert problem == (
        "distillation_loss_type='kld' (config): expected kl or mse or margin_mse or rank or "
        "regression"
    )
