"""Between log lines nothing of ours waits for the accelerator, but for what is named here."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_train import TINY_BERT, ds_file
from tests.worlds import World

WATCH = "tests.distributed.sync_cases:watch_steps"
HOST = "tensors of the host"
THERE = "finds its tensors on the device already"
# What waits (any pattern), in whose code, called by which function of ours; and why it may.
ALLOWED = {
    ("*", "deepspeed", "engine.train_engine.TrainEngine.*"): "its own norms, checks and counts",
    ("*", "deepspeed", "engine.teacher_engine.TeacherEngine.*"): "likewise",
    ("*", "deepspeed", "models.*"): "its hooks on modules, at ZeRO-3",
    ("*", "deepspeed", "engine.whole_parameters.*"): "its gathering, which " + THERE,
    (
        "*",
        "transformers",
        "models.*",
    ): "asks every mask whether it hides anything, to pick a kernel",
    ("tolist", "", "training.nonfinite.StepGuard._agree"): "no bad step is made, on any rank",
    ("to", "", "training.nonfinite.StepGuard._agree"): "the norm of an offloaded gradient",
    ("to", "", "engine.train_engine.TrainEngine._plain_gradient_norm"): THERE,
    ("to", "", "engine.ema.ShardedAverage.update"): THERE,
    ("to", "", "similarity.Embeddings.to"): "towards an accelerator it does not wait",
    ("tolist", "", "losses.batch._gather_negatives"): HOST,
    ("*", "", "losses.inputs.LossInputs.check"): HOST,
    ("*", "", "distributed.comm.all_*"): HOST,
    ("equal", "", "distributed.seeding.RngState.equals*"): HOST,  # an accelerator's state too
}


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Texts of several lengths with no to two negatives."""
    rows = [
        {
            "query": "find " * (1 + index % 4) + str(index),
            "positive": "answer " * (1 + index % 5) + str(index),
            "negatives": [f"wrong {index} {place}" for place in range(index % 3)],
        }
        for index in range(24)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TEXT = {"model_name": TINY_BERT, "retrieval_mode": "t2t", "image_root": None}
INFONCE = {**TEXT, "use_mrl": True, "mrl_dims": [8, 4], "mask_duplicates": True}
TOKENS = {
    **TEXT,
    "pooling_method": "none",
    "loss_type": "colbert",
    "loss_bidirectional": None,
    "learnable_temperature": None,
}
TAUGHT = {**INFONCE, "teachers": [{"ema_decay": 0.5}, {"model_name": TINY_BERT, "mode": "cached"}]}
PLAIN = {"use_gradient_cache": False, "gradient_cache_chunk_size": None}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(0, TOKENS), (1, TAUGHT), (2, INFONCE), (3, {}), (3, TOKENS | PLAIN)],
)
@pytest.mark.one_in(2)
def test_what_waits_between_log_lines(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    texts: str,
    stage: int,
    changes: dict[str, Any],
) -> None:
    data = {"data_path": texts} if "model_name" in changes else {}
    config = make_config(**data, **changes, logging_steps=100, val_data_path=None, max_steps=4)
    results = world(2).run(WATCH, config=config, ds_config=ds_file(stage))
    for result in results:
        assert "error" not in result, result["error"]
        assert result["watched"] == 2
    found = {key for result in results for key in result["found"]}
    assert sorted(key for key in found if not _allowed(*key)) == []


def _allowed(what: str, who: str, ours: str) -> bool:
    who = "" if who == ours else who
    return any(
        fnmatch(what, pattern) and who == package and fnmatch(ours, function)
        for pattern, package, function in ALLOWED
    )
