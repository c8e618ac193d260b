"""F25: NaN and infinity in loss, gradient and embeddings; F26: what stands out.

All ranks agree in the same step, weights and moments never become NaN, and a step that is skipped
leaves them bit for bit as if it had never been computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_train import ds_file, metrics_of
from tests.parity.conftest import folders
from tests.parity.test_adamw import adamw_config
from tests.worlds import World

__all__ = ["folders"]

pytestmark = [pytest.mark.faults]

HOST = {"offload_optimizer": {"device": "cpu"}}
FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 7}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"fp16": FP16},
    "fp16, fixed scale": {"precision": "fp16"},
    "fp16, smallest scale": {"fp16": {**FP16, "min_loss_scale": 128}},
    "offloaded": {"zero": HOST, "torch_adam": False},
    "fp16, offloaded": {"zero": HOST, "torch_adam": False, "precision": "fp16"},
    "bf16, offloaded": {"zero": HOST, "torch_adam": False, "precision": "bf16"},
}
FAULTS = ["nan loss", "inf loss", "inf gradient", "nan embedding"]
# Of every product of stage, setting and fault (--all) one that is unlike the others.
QUICK = [
    (0, "fp32", "nan loss", 3),
    (1, "fp32", "inf gradient", 3),
    (2, "fp32", "nan embedding", None),
    (3, "fp32", "inf gradient", 3),
    (0, "bf16", "inf gradient", 3),
    (2, "bf16", "inf gradient", 3),
    (3, "bf16", "nan loss", None),
    (2, "fp16", "nan loss", 3),
    (2, "fp16, smallest scale", "inf gradient", 3),
    (1, "fp16, fixed scale", "inf loss", 3),
    (2, "fp16, offloaded", "inf gradient", 3),
    (3, "bf16, offloaded", "nan loss", 3),
]
ALL = [
    (stage, setting, fault, chunk_size)
    for stage in (0, 1, 2, 3)
    for setting in SETTINGS
    for fault in FAULTS
    for chunk_size in (None, 3)
    # At stage 0 neither fp16 nor an offloaded optimizer is offered.
    if stage > 0 or setting in ("fp32", "bf16")
    if (setting, fault) != ("fp16", "inf gradient")  # fp16 lowers its loss scale then
    if chunk_size or fault != "inf gradient"  # broken is the second chunk
]


def config_of(stage: int, setting: str) -> dict[str, Any]:
    return adamw_config(stage, **SETTINGS[setting])


@pytest.fixture
def run(
    world: Callable[[int], World], folders: dict[float, Path], tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    def call(case: str, **settings: Any) -> list[dict[str, Any]]:
        return world(2).run(
            f"tests.faults.nonfinite_cases:{case}",
            folder=str(folders[0.0]),
            out=str(tmp_path),
            **settings,
        )

    return call


def check_skipped(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["skipped"] == [False, True, False]
        assert result["tensors"] > 10
        assert result["finite"]
        assert result["equal"]
        assert result["same_rate"]  # the schedule waits, as after an overflow of fp16
        assert result["same_scale"]
        assert result["counters"] == {
            "global_steps": 3,
            "skipped_steps": 1,
            "micro_steps": 3,
            "global_samples": 36,
        }


@pytest.mark.parametrize(("stage", "setting", "fault", "chunk_size"), QUICK)
@pytest.mark.one_in(2)
def test_a_skipped_step_leaves_no_trace(
    run: Callable[..., Any], stage: int, setting: str, fault: str, chunk_size: int | None
) -> None:
    ds_config = config_of(stage, setting)
    check_skipped(run("skip_one", ds_config=ds_config, fault=fault, chunk_size=chunk_size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "setting", "fault", "chunk_size"), [cell for cell in ALL if cell not in QUICK]
)
def test_the_other_cells(
    run: Callable[..., Any], stage: int, setting: str, fault: str, chunk_size: int | None
) -> None:
    ds_config = config_of(stage, setting)
    check_skipped(run("skip_one", ds_config=ds_config, fault=fault, chunk_size=chunk_size))


@pytest.mark.parametrize(
    ("stage", "fault", "problem"),
    [
        (1, "nan loss", "the loss is nan on rank 1"),
        (
            2,
            "nan embedding",  # of the longest query of each chunk
            "the loss is nan on rank 0, nan on rank 1; not finite are the embeddings of query of "
            "pairs, record 106 (rank 1), query of pairs, record 107 (rank 1)",
        ),
    ],
)
def test_the_run_ends_and_says_where(
    run: Callable[..., Any], tmp_path: Path, stage: int, fault: str, problem: str
) -> None:
    results = run("end", ds_config=config_of(stage, "fp32"), faults=[None, fault])
    for result in results:
        assert result["attempts"] == 2
        assert not result["changed"]
        assert result["error"] == (
            f"step 2: {problem}; the records of all ranks are in "
            f"{tmp_path / 'nonfinite-step-2.json'}. No weight has changed in this step. A resumed "
            "run meets the same batch again: set on_nonfinite: skip to leave it out, lower lr, or "
            "begin anew in another precision"
        )


def test_an_infinite_gradient_is_named_by_its_parameters(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    for stage in (1, 3):
        results = run("end", ds_config=config_of(stage, "fp32"), faults=["inf gradient"])
        for result in results:
            assert result["error"].startswith("step 1: the gradient is not finite, of encoder.")
            assert " more; the records of all ranks are in " in result["error"]
        report = json.loads((tmp_path / "nonfinite-step-1.json").read_text())
        assert report["gradient_norm"] is None
        assert any(name.startswith("encoder.") for name in report["parameters"])


def test_the_report_has_what_is_needed_to_find_the_record(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    run("end", ds_config=config_of(2, "fp32"), faults=["nan embedding"])
    report = json.loads((tmp_path / "nonfinite-step-1.json").read_text())
    assert report["step"] == 1
    assert report["learning_rate"] == 0.0  # warm-up
    assert report["loss_scale"] == 1.0
    assert report["learned"]["logit_scale"] == [pytest.approx(2.302585)]
    assert [found["loss"] for found in report["ranks"]] == ["nan", "nan"]
    assert [found["records"] for found in report["ranks"]] == [
        {"pairs": list(range(100, 106))},
        {"pairs": list(range(106, 112))},
    ]
    assert report["ranks"][0]["nonfinite_embeddings"] == []
    first = report["ranks"][1]["nonfinite_embeddings"][0]
    assert first == {"role": "query", "data": "pairs", "record": 107}


def test_too_many_in_a_row_end_the_run(run: Callable[..., Any], tmp_path: Path) -> None:
    bad, settings = "nan loss", {"ds_config": config_of(1, "fp32"), "skip": True}
    results = run("end", faults=[bad, bad, None, bad, bad, bad], max_in_a_row=2, **settings)
    for result in results:
        assert result["attempts"] == 6
        assert not result["changed"]
        assert result["error"].startswith("step 6: the loss is nan on rank 1; 2 steps before it")
        assert "(max_nonfinite_steps), so the model has diverged" in result["error"]
    reports = sorted(path.name for path in tmp_path.iterdir())
    assert reports == [f"nonfinite-step-{step}.json" for step in (1, 2, 4, 5, 6)]


def test_an_overflow_of_fp16_is_no_fault(run: Callable[..., Any], tmp_path: Path) -> None:
    fp16 = {**FP16, "hysteresis": 1}
    results = run("end", ds_config=adamw_config(2, fp16=fp16), faults=[None, "inf gradient", None])
    for result in results:
        assert result["error"] is None
        assert [norm is None for norm in result["norms"]] == [False, True, False]
        assert result["scale"] == 64
    assert not list(tmp_path.iterdir())


def test_at_the_smallest_loss_scale_it_is(run: Callable[..., Any]) -> None:
    ds_config = config_of(2, "fp16, smallest scale")
    for result in run("end", ds_config=ds_config, faults=[None, "inf gradient"]):
        assert " at loss scale 128, which cannot be lowered; the records" in result["error"]


def test_an_embedding_of_zeros_is_a_step_like_any_other(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Its gradient was once 1e12 times that of the others."""
    for stage in (0, 3):
        results = run("end", ds_config=config_of(stage, "fp32"), faults=[None, "zero embedding"])
        for result in results:
            assert result["error"] is None
            plain, zero = result["norms"]
            assert 0.1 * plain < zero < 10 * plain
    assert not list(tmp_path.iterdir())


def test_a_whole_run_skips_logs_and_warns(
    world: Callable[[int], World], make_config: Callable[..., str], pairs: Path, tmp_path: Path
) -> None:
    config = make_config(
        on_nonfinite="skip", replica_check_steps=1, max_steps=9, val_data_path=None, lr=1e-4
    )
    # F25 in step 3, F26 in step 7; dropout is on, so the replicas are compared under it too.
    factors = {3: float("nan"), 7: 1000.0}
    answers = world(2).run(
        "tests.faults.nonfinite_cases:train_with_factors",
        **{"factors": factors, "quiet": 4, "config": config, "ds_config": ds_file(2)},
    )
    assert all("error" not in answer for answer in answers), answers
    logged = {m["step"]: m for m in metrics_of(tmp_path / "out") if "train/loss" in m}
    assert {step: m["train/skipped_steps"] for step, m in logged.items() if step != 3} == (
        dict.fromkeys((1, 2, 4, 5, 6, 7, 8, 9), 0.0)
    )
    assert logged[3]["train/skipped_steps"] == 1.0
    assert logged[3]["train/loss"] is None
    assert logged[4]["train/lr"] == logged[3]["train/lr"]  # the schedule waits
    assert logged[7]["train/loss"] > 100
    reports = sorted(path.name for path in (tmp_path / "out").glob("*-step-*.json"))
    assert reports == ["nonfinite-step-3.json", "spike-step-7.json"]
    found = [json.loads((tmp_path / "out" / name).read_text()) for name in reports]
    for report in found:
        records = [rank["records"] for rank in report["ranks"]]
        assert [list(by_file) for by_file in records] == [[str(pairs)]] * 2
        numbers = [n for by_file in records for n in by_file[str(pairs)]]
        assert len(set(numbers)) == 8
        assert set(numbers) <= set(range(24))
    assert found[0]["problem"] == "the loss is nan on rank 1"
    assert found[1]["problem"].startswith("the loss ")
    assert " times the median of the last 5 steps (" in found[1]["problem"]
    assert " and the gradient norm " in found[1]["problem"]
    assert (tmp_path / "out" / "latest").read_text() == "checkpoint-step-9"


def test_nothing_is_written_over_a_good_checkpoint(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    """As it is by default: the run ends, and its weights would not have been worth a checkpoint."""
    config = make_config(save_steps=1, val_data_path=None)
    answers = world(2).run(
        "tests.faults.nonfinite_cases:train_with_factors",
        **{"factors": {2: float("inf")}, "quiet": 4, "config": config, "ds_config": ds_file(3)},
    )
    report = tmp_path / "out" / "nonfinite-step-2.json"
    for answer in answers:
        assert answer["error"].startswith(
            f"DivergedError: step 2: the loss is inf on rank 1; the records of all ranks are in {report}."
        )
    assert (tmp_path / "out" / "latest").read_text() == "checkpoint-step-1"
    assert not (tmp_path / "out" / "checkpoint-step-2").exists()
