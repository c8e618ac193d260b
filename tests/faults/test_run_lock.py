"""F12: two runs in one output folder; F11: a folder that is none, or takes nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.conftest import ROOT
from tests.worlds import World
from vembed_ds import run_lock
from vembed_ds.errors import ConfigError
from vembed_ds.run_lock import LOCK_FILE, RunLock
from vembed_ds.training import output

pytestmark = pytest.mark.faults

HOLDER = """
import sys, time
from pathlib import Path
from vembed_ds import run_lock
run_lock.lock_output(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(1000)
"""


@contextmanager
def other_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder's lock."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "ENDING_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.1)


def say_of_other_host(folder: Path, **changed: Any) -> None:
    """As a run on another machine leaves the file."""
    said = {"host": "far-away", "pid": 4711, "started": "2026-01-01", "command": "train", **changed}
    (folder / LOCK_FILE).write_text(json.dumps(said))


def test_a_second_run_is_refused_and_a_dead_one_makes_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with other_run(tmp_path) as other:
        expected = (
            rf"output_dir='{tmp_path}': another run is using it: host {platform.node()}, pid "
            rf"{other.pid}, since 20\d\d-.* \(-c {tmp_path}\)\. End that run, or give this one another "
            rf"output_dir; {tmp_path}/run.lock may be removed only when"
        )
        with pytest.raises(ConfigError, match=expected):
            RunLock(tmp_path)
    # Killed: nothing was tidied up.
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == other.pid
    RunLock(tmp_path).release()
    assert (
        f"its run on host {platform.node()}, pid {other.pid}, ended without a goodbye"
        in caplog.text
    )
    caplog.clear()
    RunLock(tmp_path).release()
    assert not caplog.text, "the last one said goodbye"


def test_a_run_that_is_just_ending_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "ENDING_SECONDS", 20.0)
    held = RunLock(tmp_path)
    threading.Timer(0.5, held.release).start()
    RunLock(tmp_path).release()


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    made = [tmp_path / "a" / "b", tmp_path / "a"]
    made[0].mkdir(parents=True)
    RunLock(made[0], made=made).release()
    assert not made[1].exists()
    RunLock(tmp_path).release()
    assert not list(tmp_path.iterdir()), "the folder was there before"

    made[0].mkdir(parents=True)
    lock = RunLock(made[0], made=made)
    lock.keep()
    lock.release()
    RunLock(made[0], made=made).release()
    assert (made[0] / LOCK_FILE).read_text() == "", "an earlier run's file stays"


def test_a_file_that_was_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "ENDING_SECONDS", 20.0)
    first = RunLock(tmp_path)
    opened, found = threading.Event(), list[RunLock]()

    def wait() -> None:
        found.append(RunLock(tmp_path))

    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: opened.set())
    waiting = threading.Thread(target=wait)
    waiting.start()
    assert opened.wait(10)
    first.release()
    waiting.join()
    monkeypatch.setattr(run_lock, "ENDING_SECONDS", 0.1)
    with pytest.raises(ConfigError, match="another run is using it"):
        RunLock(tmp_path)
    found[0].release()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_gone_does_not_hide_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(descriptor: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    @run_lock.frees_output
    def train() -> None:
        run_lock.lock_output(tmp_path)
        monkeypatch.setattr(os, "fsync", stale)
        raise ConfigError("the real one")

    with pytest.raises(ConfigError, match="the real one"):
        train()
    monkeypatch.undo()
    assert not run_lock._held


def sleep_on() -> None:
    time.sleep(1000)


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    run_lock.lock_output(tmp_path)
    forked = multiprocessing.get_context("fork").Process(target=sleep_on, daemon=True)
    forked.start()
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    # As a killed process does: the file is closed, and nobody unlocks or empties it.
    (held,) = run_lock._held
    held._file.close()
    try:
        assert forked.is_alive()
        RunLock(tmp_path).release()
    finally:
        held._free.set()
        run_lock._held.clear()
        for process in (forked, started):
            process.kill()
        forked.join()
        started.wait()


def test_a_run_on_another_machine_is_refused_while_it_touches_the_file(tmp_path: Path) -> None:
    # Its lock is not seen here, as on some network file systems.
    held = RunLock(tmp_path)
    fcntl.flock(held._file, fcntl.LOCK_UN)
    say_of_other_host(tmp_path)
    with pytest.raises(
        ConfigError, match=r"another run is using it: host far-away, pid 4711, since"
    ):
        RunLock(tmp_path)
    held.release()


def test_a_run_on_another_machine_that_is_gone_makes_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    say_of_other_host(tmp_path)
    lock = RunLock(tmp_path)
    assert (
        "is in use by host far-away, pid 4711; looking for 0 s whether that run lives"
        in caplog.text
    )
    assert "its run on host far-away, pid 4711, ended without a goodbye" in caplog.text
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_without_locks_the_touched_file_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = RunLock(tmp_path)
    assert "this file system has no locks (No locks available)" in caplog.text
    with pytest.raises(ConfigError, match=f"another run is using it: .* pid {os.getpid()}"):
        RunLock(tmp_path)
    first._free.set()  # dead: it touches the file no more
    first._file.close()
    RunLock(tmp_path).release()


def test_a_file_that_is_none_of_ours_is_no_obstacle_for_long(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text('{"host": "half')
    RunLock(tmp_path).release()


@pytest.mark.distributed(2)
def test_a_run_is_refused_on_every_rank_and_gives_the_folder_back(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def errors(*, resume: str | None = None, **changes: Any) -> list[str]:
        found = world(2).run(
            "tests.faults.run_cases:run_without_model",
            config=make_config(**changes),
            ds_config=str(ROOT / "ds_configs" / "zero2.json"),
            resume=resume,
        )
        return [str(error) for error in found]

    for error in errors(output_dir=str(tmp_path / "new" / "out"), batch_size=100):
        assert "24 records do not fill one global batch of 200" in error
        assert "the model is loaded here" not in error
    assert not (tmp_path / "new").exists()
    assert errors() == ["ConfigError: the model is loaded here"] * 2
    RunLock(out).release()
    (out / "metrics.jsonl").write_text("of the other run")
    # The other run is just replacing its checkpoint.
    (out / ".checkpoint-step-2.replaced").mkdir()
    with other_run(out) as other:
        own, told = errors(resume="auto")
    assert (out / ".checkpoint-step-2.replaced").is_dir()
    refusal = (
        f"output_dir={str(out)!r}: another run is using it: host {platform.node()}, pid {other.pid}"
    )
    assert own.startswith(f"ConfigError: {refusal}")
    assert told.startswith(f"DistributedError: rank 0 failed: {refusal}")
    assert (out / "metrics.jsonl").read_text() == "of the other run", "it was moved aside"

    place = out / "metrics.jsonl" / "below"
    for error in errors(output_dir=str(place)):
        assert f"output_dir={str(place)!r}: {out}/metrics.jsonl is a file; give a folder" in error


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that not even root can write to."""
    with mounted(tmp_path / "read-only", "ro") as folder:
        yield folder


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("this machine does not let the tests mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_folder_is_refused(read_only: Path) -> None:
    for place in (read_only, read_only / "out"):
        expected = (
            rf"output_dir='{place}': rank 0 on \S+ cannot write there \(Read-only file system\); give "
            "a folder that every rank can write to, on a disk with room"
        )
        with pytest.raises(ConfigError, match=expected):
            output.open_output(str(place))


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k") as small:
        (small / "data").write_bytes(bytes(60000))
        with pytest.raises(ConfigError, match=r"cannot write there \(No space left on device\)"):
            output.open_output(str(small))
        assert [path.name for path in small.iterdir()] == ["data"], "the attempt is removed"


@pytest.mark.parametrize("below", ["", "/folder"])
def test_a_file_in_the_way_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "out").write_text("")
    path = f"{tmp_path}/out{below}"
    expected = (
        f"output_dir={path!r}: {tmp_path}/out is a file; give a folder, or a name that is free"
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        output.open_output(path)


def test_a_disk_without_room_for_a_checkpoint_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000_000))
    frozen = nn.Parameter(torch.empty(10**8, device="meta"), requires_grad=False)
    trained = nn.Parameter(torch.empty(6 * 10**7, device="meta"))
    output.warn_of_little_space(tmp_path, [frozen, trained])
    assert "has 1.0 GB free, and a checkpoint takes up to 1.4 GB: make room" in caplog.text
    caplog.clear()
    output.warn_of_little_space(tmp_path, [trained])
    assert not caplog.text
