"""What a student gets from its teachers before its engine is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from vembed_ds.config.loading import parse_config
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.training.loss_setup import weak_distillation
from vembed_ds.training.teacher_sources import Teachers
from vembed_ds.training.teachers import join_student


@pytest.mark.parametrize(
    ("loss_type", "mrl_dims", "expected"),
    [
        ("regression", (), {"1": (9, 6)}),
        # A prefix is narrower than the teacher's embedding, whichever data set's loss it is.
        ("regression", (4,), {"0": (6, 6), "1": (9, 6)}),
        ("kl", (4,), {}),
    ],
)
def test_projections_are_learned_where_widths_differ(
    tmp_path: Path,
    loss_type: str,
    mrl_dims: tuple[int, ...],
    expected: dict[str, tuple[int, int]],
) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    config = parse_config(
        {
            "model_name": "some/model",
            "data_path": str(tmp_path / "train.jsonl"),
            "teachers": [{"model_name": "a"}, {"model_name": "b"}],
            "distillation_loss_type": loss_type,
        }
    )
    model = EmbeddingModel(nn.Linear(1, 1))
    join_student(Teachers({}, widths={0: 6, 1: 9}), model, config, width=6, mrl_dims=mrl_dims)
    found = {name: tuple(p().shape) for name, p in model.teacher_projections.items()}
    assert found == expected


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, True),
        ({"distillation_loss_type": "mse", "distillation_alpha": 0.2}, True),
        ({"distillation_alpha": 0.007}, False),
        ({"distillation_loss_type": "rank"}, False),
        ({"teacher_model_name": None}, False),
    ],
)
def test_settings_under_which_a_teacher_hardly_matters_are_told(
    settings: dict[str, Any], told: bool
) -> None:
    values = {"model_name": "a/b", "data_path": ".", "teacher_model_name": "a/b", **settings}
    notice = weak_distillation(parse_config(values))
    assert (notice is not None) == told
    if notice is not None:
        assert notice.startswith("distillation_alpha=")
        assert "hardly matter" in notice
