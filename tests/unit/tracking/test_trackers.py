"""metrics.jsonl, TensorBoard, and wandb through a stand-in."""

from __future__ import annotations

import errno
import json
import logging
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vembed_ds.errors import ConfigError, StorageError, VembedError
from vembed_ds.tracking.trackers import Tracker, build_tracker


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start(folder: Path, report_to: str = "none", **options: Any) -> Tracker:
    return build_tracker(report_to, folder=folder, run_name="r", config={"lr": 1.0}, **options)


def run_steps(folder: Path, steps: list[int], **options: Any) -> None:
    tracker = start(folder, **options)
    for step in steps:
        tracker.log({"train/loss": step / 10}, step=step)
    tracker.close()


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = start(tmp_path / "new")
    tracker.log({"train/loss": 0.5, "train/lr": 1e-3}, step=10)
    assert lines(tmp_path / "new") == [{"step": 10, "train/loss": 0.5, "train/lr": 1e-3}]
    tracker.close()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"metrics.jsonl", "metrics.csv"}


def test_resuming_drops_what_is_made_again(tmp_path: Path) -> None:
    run_steps(tmp_path, [1, 2, 3, 4])
    run_steps(tmp_path, [3, 4, 5], resume_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    run_steps(tmp_path, [0, 1, 2])
    run_steps(tmp_path, [1])
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_line_cut_off_by_a_crash_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tra')
    run_steps(tmp_path, [3], resume_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]
    assert "removed an incomplete last line" in caplog.text


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"loss": 1}', b"\xff\xfe", b"\0\0\0\0"])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n%b\n' % line)
    with pytest.raises(VembedError, match=r"metrics\.jsonl, line 2: not a JSON object with a step"):
        start(tmp_path, resume_step=3)


def test_values_that_json_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = start(tmp_path)
    tracker.log({"train/loss": float("nan"), "norm": float("inf"), "lr": 1.0}, step=7)
    tracker.close()
    assert lines(tmp_path) == [{"step": 7, "train/loss": None, "norm": None, "lr": 1.0}]
    assert "step 7: train/loss is nan" in caplog.text
    assert "step 7: norm is inf" in caplog.text


def test_a_full_disk_stops_the_run(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    tracker.file.path = Path("/dev/full")
    with pytest.raises(VembedError, match=r"/dev/full: cannot be written \(.*No space left"):
        tracker.log({"train/loss": 1.0}, step=1)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EDQUOT, VembedError), (errno.EIO, StorageError)]
)
def test_a_failing_file_server_is_worth_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[VembedError]
) -> None:
    tracker = start(tmp_path)

    def fail(text: str) -> None:
        raise OSError(number, "failed")

    monkeypatch.setattr(tracker.file, "_append", fail)
    with pytest.raises(VembedError) as raised:
        tracker.log({"train/loss": 1.0}, step=1)
    assert type(raised.value) is kind


@pytest.fixture
def full() -> Iterator[Callable[[int | None], None]]:
    """``full(size)``: no file may be larger any more; ``None``: as before."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual if size is None else (size, usual[1]))

    yield limit
    limit(None)


def test_a_patient_file_waits_for_room(
    tmp_path: Path, full: Callable[[int | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path, patient=True)
    tracker.log({"loss": 1.0}, step=1)
    full(40)  # room for half of the second line
    for step in (2, 3):
        tracker.log({"loss": 1.0}, step=step)
    half = (tmp_path / "metrics.jsonl").read_text()
    full(None)
    assert len(half) == 40
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "on_save_error=warn: training goes on although " in warning
    assert "metrics.jsonl: cannot be written (" in warning
    tracker.log({"loss": 1.0}, step=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    full(40)
    tracker.log({"loss": 1.0}, step=5)
    full(None)
    tracker.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert len(caplog.records) == 2


def test_what_a_patient_file_loses_is_told(
    tmp_path: Path,
    full: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("vembed_ds.tracking.metrics_file.MOST_WAITING", 3)
    tracker = start(tmp_path, patient=True)
    full(0)
    for step in range(1, 6):
        tracker.log({"loss": 1.0}, step=step)
    full(None)
    tracker.log({"loss": 1.0}, step=6)
    assert [line["step"] for line in lines(tmp_path)] == [4, 5, 6]
    full(0)
    tracker.log({"loss": 1.0}, step=7)
    tracker.close()
    full(None)
    assert [line["step"] for line in lines(tmp_path)] == [4, 5, 6]
    assert "metrics.jsonl: still cannot be written (" in caplog.text
    assert "metrics.jsonl: 4 lines are lost" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VembedError, match=r"cannot be written .* choose another output_dir"):
        start(tmp_path / "file" / "run")


def test_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"report_to='swanlb': no tracker 'swanlb' \(did you mean "
    ):
        start(tmp_path, "swanlb")


def test_tensorboard_holds_scalars_and_settings(tmp_path: Path) -> None:
    run_steps(tmp_path, [1, 2, 3], report_to="tensorboard")
    run_steps(tmp_path, [3, 4], report_to="tensorboard", resume_step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, round(e.value, 6)) for e in events.Scalars("train/loss")]
    assert found == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert "config/text_summary" in events.Tags()["tensors"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_tensorboard_of_a_fresh_run_hides_the_old_one(tmp_path: Path) -> None:
    run_steps(tmp_path, [0, 1, 2], report_to="tensorboard")
    run_steps(tmp_path, [1], report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1]


class FakeWandb(SimpleNamespace):
    """Records calls; ``broken`` names those that raise."""

    class Error(Exception):
        pass

    def __init__(self, *broken: str) -> None:
        super().__init__(calls=[], broken=broken, id="run-7")

    def init(self, **options: Any) -> FakeWandb:
        return self._call("init", options)

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._call("log", (step, metrics))

    def finish(self) -> None:
        self._call("finish", None)

    def _call(self, name: str, value: Any) -> FakeWandb:
        self.calls.append((name, value))
        if name in self.broken:
            raise self.Error("no\nnetwork")
        return self


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeWandb:
    fake = FakeWandb(*getattr(request, "param", ()))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_wandb_gets_name_settings_and_metrics(tmp_path: Path, wandb: FakeWandb) -> None:
    run_steps(tmp_path, [1], report_to="wandb")
    options = {"project": "vembed-ds", "name": "r", "dir": str(tmp_path), "config": {"lr": 1.0}}
    assert wandb.calls == [("init", options), ("log", (1, {"train/loss": 0.1})), ("finish", None)]


def test_a_resumed_run_goes_on_with_its_wandb_run(tmp_path: Path, wandb: FakeWandb) -> None:
    run_steps(tmp_path, [1, 2, 3], report_to="wandb")
    run_steps(tmp_path, [3, 4], report_to="wandb", resume_step=2)
    first, second = (options for name, options in wandb.calls if name == "init")
    assert not {"id", "resume"} & first.keys()
    assert second == first | {"id": "run-7", "resume": "allow"}
    run_steps(tmp_path, [1], report_to="wandb")  # a fresh one has a run of its own
    assert wandb.calls[-3] == ("init", first)


def test_a_resumed_run_that_wandb_has_not_seen(tmp_path: Path, wandb: FakeWandb) -> None:
    run_steps(tmp_path, [1, 2])
    run_steps(tmp_path, [3], report_to="wandb", resume_step=2)
    assert "id" not in wandb.calls[0][1]


def test_all_means_all(tmp_path: Path, wandb: FakeWandb) -> None:
    tracker = start(tmp_path, "all")
    assert list(tracker.sinks) == ["metrics.csv", "wandb", "tensorboard"]
    tracker.close()
    assert (tmp_path / "tensorboard").is_dir()
    assert wandb.calls[-1] == ("finish", None)


@pytest.mark.parametrize("wandb", [("log", "finish")], indirect=True)
def test_a_tracker_that_fails_warns_once(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run_steps(tmp_path, [1, 2, 3], report_to="wandb")
    assert len(caplog.records) == 1
    assert "wandb failed; training goes on, metrics.jsonl is complete" in caplog.text
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [name for name, _ in wandb.calls] == ["init", "log", "log", "log", "finish"]


@pytest.mark.parametrize("wandb", [("init",)], indirect=True)
def test_wandb_that_cannot_start(tmp_path: Path, wandb: FakeWandb) -> None:
    with pytest.raises(ConfigError, match=r"wandb cannot start \(no network\); run wandb login"):
        start(tmp_path, "wandb")
    assert wandb.calls[0][0] == "init"


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"report_to=all: wandb is not installed; run pip install 'vembed-ds\[wan"
    ):
        start(tmp_path, "all")
