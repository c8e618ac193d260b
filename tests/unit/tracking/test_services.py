"""Every tracker: what a failing one does, and the real packages where they are installed.

The extra `dev` has them all.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from vembed_ds.errors import ConfigError
from vembed_ds.tracker_names import TRACKERS, tracker_names
from vembed_ds.tracking import trackers
from vembed_ds.tracking.mlflow_sink import flattened, permitted_name
from vembed_ds.tracking.trackers import Tracker, build_tracker

CLASSES = {
    "tensorboard": "TensorBoardSink",
    "wandb": "WandbSink",
    "swanlab": "SwanlabSink",
    "mlflow": "MlflowSink",
}
CONFIG = {"training": {"lr": 1.0, "names": ["a"]}, "many": {f"k{n}": n for n in range(120)}}


def needs(package: str) -> Any:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs the extra {package}")


def start(folder: Path, report_to: Any, **options: Any) -> Tracker:
    return build_tracker(report_to, folder=folder, run_name="r", config=CONFIG, **options)


def run_steps(folder: Path, steps: list[int], report_to: str, **options: Any) -> None:
    tracker = start(folder, report_to, **options)
    for step in steps:
        tracker.log({"train/loss": step / 10, "eval/recall@1": float(step)}, step=step)
    tracker.close()


def test_names_of_trackers() -> None:
    assert set(CLASSES) == set(TRACKERS)
    assert tracker_names("none") == tracker_names([]) == ()
    assert tracker_names("all") == ("tensorboard", "wandb")
    assert tracker_names("wandb, tensorboard,wandb") == ("wandb", "tensorboard")
    assert tracker_names(["mlflow", "swanlab"]) == ("mlflow", "swanlab")
    with pytest.raises(ValueError, match="all stands alone; remove it, or the others"):
        tracker_names("all,mlflow")
    with pytest.raises(ValueError, match=r"no tracker 'mlflw' \(did you mean mlflow\?\): expected"):
        tracker_names("mlflw")


class Broken:
    """Does nothing but fail."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.asked: list[str] = []

    def write(self, metrics: Any, *, step: int) -> None:
        self.asked.append("write")
        raise RuntimeError("the server is gone")

    def close(self) -> None:
        self.asked.append("close")
        raise OSError("again")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_fails_stops_neither_run_nor_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    other = next(one for one in ("tensorboard", "wandb") if one != name)
    monkeypatch.setattr(trackers, CLASSES[name], Broken)
    if other == "wandb":
        monkeypatch.setattr(trackers, "WandbSink", lambda *a, **k: None)
        other = name
    tracker = start(tmp_path, [name] if other == name else [name, other])
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.log({"train/loss": 0.5}, step=step)
        tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} failed; training goes on, metrics.jsonl is complete, later failures are not reported"
    ]
    broken: Any = tracker.sinks[name]
    assert broken.asked == ["write", "write", "close"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_a_tracker_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as raised:
        start(tmp_path, f"tensorboard,{name}")
    assert str(raised.value) == (
        f"report_to=tensorboard,{name}: {name} is not installed; run pip install "
        f"'vembed-ds[{name}]' or take {name} out of report_to"
    )
    assert not (tmp_path / "tensorboard").exists()


class Module:
    """Stands for a package whose every function fails."""

    def __getattr__(self, name: str) -> Any:
        if name in ("entities", "Metric", "Param"):
            return self
        raise RuntimeError("no\nroute")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swanlab", "swanlab cannot start (no route); run swanlab login, set SWANLAB_MODE=offline"),
        ("wandb", "wandb cannot start (no route); run wandb login, set WANDB_MODE=offline, or"),
        (
            "mlflow",
            "mlflow cannot start at localhost:1 (no route); correct MLFLOW_TRACKING_",
        ),
    ],
)
def test_a_tracker_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, name, Module())  # type: ignore[arg-type]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@localhost:1")
    with pytest.raises(ConfigError) as raised:
        start(tmp_path, name)
    assert str(raised.value).startswith(f"report_to={name}: {words}")


def test_what_mlflow_takes() -> None:
    assert permitted_name("eval/recall@10") == "eval/recall_at_10"
    assert flattened({"a": {"b": {"c": [1]}, "d": 2}, "e": {}}) == {"a.b.c": [1], "a.d": 2}


@needs("mlflow")
def test_the_real_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run_steps(tmp_path / "out", [1, 2, 3], "mlflow")
    run_steps(tmp_path / "out", [3, 4], "mlflow", resume_step=2)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("vembed-ds")
    (run,) = client.search_runs([experiment.experiment_id])  # one run, resumed
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")
    assert run.data.params["training.lr"] == "1.0"
    assert len(run.data.params) == 122
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [
        *((1, 0.1), (2, 0.2), (3, 0.3)),
        *((3, 0.3), (4, 0.4)),
    ]
    assert client.get_metric_history(run.info.run_id, "eval/recall_at_1")[-1].value == 4.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@needs("mlflow")
def test_an_mlflow_store_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/x.db")
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"mlflow cannot start at sqlite:///.*x\.db \(.+\); correct"
    ):
        start(tmp_path, "mlflow")


@needs("swanlab")
def test_the_real_swanlab_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    run_steps(tmp_path, [1, 2], "swanlab")
    first = (tmp_path / "swanlab_run_id.txt").read_text()
    run_steps(tmp_path, [2, 3], "swanlab", resume_step=1)
    assert (tmp_path / "swanlab_run_id.txt").read_text() == first
    found = list((tmp_path / "swanlab").glob(f"run-*/run-{first.strip()}.swanlab"))
    assert len(found) in (1, 2)
    assert b"train/loss" in b"".join(path.read_bytes() for path in found)


@needs("swanlab")
def test_swanlab_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at the start, with the remedy; not a question in a job that nobody sees."""
    monkeypatch.setenv("SWANLAB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"swanlab cannot start \(.+\); run swanlab login"):
        start(tmp_path, "swanlab")


@needs("wandb")
def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_steps(tmp_path, [1, 2], "wandb")
    first = (tmp_path / "wandb_run_id.txt").read_text().strip()
    run_steps(tmp_path, [2, 3], "wandb", resume_step=1)
    assert (tmp_path / "wandb_run_id.txt").read_text().strip() == first
    kept = list((tmp_path / "wandb").glob(f"offline-run-*{first}"))
    assert kept
    assert all(any(folder.glob("*.wandb")) for folder in kept)


@needs("wandb")
def test_a_variable_of_wandb_that_it_does_not_know(tmp_path: Path) -> None:
    """In a process of its own: wandb remembers what it read first."""
    code = (
        "import sys; from vembed_ds.tracking.wandb_sink import WandbSink; from pathlib import Path\n"
        "WandbSink(Path(sys.argv[1]), run_name='r', config={}, report_to='wandb', resuming=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "WANDB_MODE": "ofline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ConfigError: report_to=wandb: wandb cannot start (1 validation error" in done.stderr
