"""Loader processes: nothing that happens to one may hang the run, or outlive it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.loader_probes import LOCK, Probe
from vembed_ds.data import loader as loading
from vembed_ds.data.collators import Batch
from vembed_ds.data.loader import BatchLoader
from vembed_ds.data.waiting import WaitInterrupted
from vembed_ds.errors import ConfigError, DataError, VembedError

ROOT = Path(__file__).parents[3]


def batches_of(
    action: str, *, at: int = 0, rows: Sequence[int] = (0,), workers: int = 1, seconds: float = 60
) -> list[Batch]:
    """One batch per row."""
    loader = BatchLoader(
        Probe(action, at=at),
        [[row] for row in rows],
        num_workers=workers,
        prefetch_factor=2,
        timeout_seconds=seconds,
    )
    return list(loader)


def answer(action: str) -> int:
    (batch,) = batches_of(action)
    return batch.indices[0]


def error(batch: Batch) -> str:
    assert batch.indices == []
    return str(batch.error)


def test_a_worker_uses_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert answer("threads") == 11
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_a_lock_that_a_thread_holds_is_free_in_a_worker() -> None:
    """The deadlock of a fork with threads: nobody would release the copy of the lock."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with LOCK:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        (batch,) = batches_of("take_lock", seconds=60)
        assert batch.error is None
        assert batch.indices == [7]
    finally:
        done.set()
        thread.join()


def test_workers_are_forked_from_a_process_that_runs_no_python_thread() -> None:
    server = answer("parent")
    assert server != os.getpid()
    assert server == forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    names = [path.read_text().strip() for path in Path(f"/proc/{server}/task").glob("*/comm")]
    # jemalloc's own thread is stopped and started by its handlers around every fork.
    assert [name for name in names if name != "jemalloc_bg_thd"] == [names[0]]


def test_relative_paths_mean_the_same_in_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only-here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert answer("is_folder_here") == 1


def test_an_unexpected_error_arrives_with_its_trace() -> None:
    first, second = batches_of("fail", rows=[0, 5])
    assert type(first.error) is VembedError
    assert re.search(
        r"a loader process failed at records 0:\n(?s:.*)ZeroDivisionError: a defect of ours",
        error(first),
    )
    assert second.indices == [5]


@pytest.mark.parametrize("action", ["die", "die_while_answering"])
def test_a_killed_worker_is_named_at_once(action: str) -> None:
    started = time.monotonic()
    first, second, third = batches_of(action, at=4, rows=[3, 4, 5], seconds=300)
    assert time.monotonic() - started < 100
    assert first.indices == [3]
    assert re.fullmatch(
        r"loader process 1 of 1 \(pid \d+\), at records 4: was killed by SIGKILL, which is often "
        r"the system being out of memory; lower num_workers or prefetch_factor",
        error(second),
    )
    assert isinstance(second.error, DataError)
    assert error(third) == error(second)


def test_a_worker_that_ends_is_named() -> None:
    (batch,) = batches_of("leave")
    assert "at records 0: ended with exit code 3; its own message is above" in error(batch)


@pytest.mark.parametrize("action", ["sleep", "stop", "stop_while_answering"])
def test_a_stuck_worker_is_given_up_and_ended(action: str) -> None:
    answer("pid")  # the fork server is up, so that its start is not in the seconds
    started = time.monotonic()
    (batch,) = batches_of(action, seconds=1.5)
    assert re.fullmatch(
        r"loader process 1 of 1 \(pid (\d+)\), at records 0: gave no answer for 1.5 s; is a file "
        r"system stuck, or loader_timeout_seconds too short\?",
        error(batch),
    )
    assert time.monotonic() - started < 10
    assert gone(int(error(batch).partition("pid ")[2].partition(")")[0]))


@pytest.mark.slow
def test_only_the_stuck_workers_parts_are_lost() -> None:
    batches = batches_of("sleep", at=2, rows=range(6), workers=2, seconds=10)
    assert [batch.indices for batch in batches] == [[0], [1], [], [3], [], [5]]


def test_a_wait_that_nobody_wants_ends_soon() -> None:
    started = time.monotonic()
    loader = BatchLoader(
        Probe("sleep", at=1),
        [[row] for row in range(3)],
        num_workers=1,
        prefetch_factor=2,
        interrupted=lambda: time.monotonic() - started > 30,
    )
    batches = iter(loader)
    assert next(batches).indices == [0]
    started = time.monotonic() - 31
    with pytest.raises(WaitInterrupted):
        next(batches)
    assert time.monotonic() - started - 31 < 10


def test_signals_that_stop_a_run_do_not_end_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers send them to all children of a rank; the batches are wanted until it stops."""
    monkeypatch.setattr(loading, "PART_SIZE", 1)
    loader = BatchLoader(Probe("pid"), [[0]] * 20, num_workers=1, prefetch_factor=1)
    batches = iter(loader)
    (worker,) = next(batches).indices
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker, number)
    assert [batch.indices for batch in batches] == [[worker]] * 19
    assert gone(worker)


def test_workers_end_with_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PART_SIZE", 1)
    loader = BatchLoader(Probe("pid"), [[0]] * 50, num_workers=2, prefetch_factor=1)
    iteration = iter(loader)
    workers = {next(iteration).indices[0] for _ in range(4)}
    assert len(workers) == 2
    iteration.close()  # type: ignore[attr-defined]
    assert all(gone(worker) for worker in workers)


SCRIPT = """
import sys
from tests.loader_probes import Probe
from vembed_ds.data.loader import BatchLoader

class Own(Probe):
    pass

probe = {probe}
batches = [[row % 8] for row in range({rows})]
loader = BatchLoader(probe, batches, num_workers=1, prefetch_factor=2)
iteration = iter(loader)
for batch in iteration:
    print(*batch.indices, batch.error, flush=True)
    {after}
"""


def script(
    folder: Path, *, probe: str = "Probe('pid')", rows: int = 2, after: str = ""
) -> subprocess.Popen[str]:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(probe=probe, rows=rows, after=after))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(path)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    process = script(tmp_path)
    output, errors = process.communicate(timeout=120)
    assert re.fullmatch(r"\d+ None\n1 None\n", output), errors
    assert process.returncode == 0


def test_what_a_script_defines_itself_is_refused(tmp_path: Path) -> None:
    _, errors = script(tmp_path, probe="Own('pid')").communicate(timeout=120)
    assert (
        "ConfigError: num_workers: Own is defined in the script that was started, which loader "
        "processes do not run; move it to a module of its own, or set num_workers: 0"
    ) in errors


def test_what_cannot_be_pickled_is_refused() -> None:
    probe = Probe("pid")
    probe.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"cannot be sent to loader processes \(.*lock.*; set num_workers: 0"
    ):
        BatchLoader(probe, [[0]], num_workers=1, prefetch_factor=2)


def test_a_script_that_ends_in_the_middle_ends_its_workers(tmp_path: Path) -> None:
    """They ignore the signal by which multiprocessing would end them at exit."""
    process = script(tmp_path, rows=10**6, after="break")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert gone(int(output.split()[0]))


def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    process = script(tmp_path, rows=10**6)
    assert process.stdout is not None
    worker = int(process.stdout.readline().split()[0])
    server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    assert not gone(worker, seconds=0)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert gone(worker)
    assert gone(server)


def gone(pid: int, *, seconds: float = 10) -> bool:
    """Whether a process ends (or is a zombie) within ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
