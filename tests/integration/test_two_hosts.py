"""A launch by host file on two machines (:mod:`tests.hosts`), and one that is cut off in the middle."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.checkpoints import load_consolidated
from tests.distributed.conftest import make_config, pairs
from tests.distributed.test_train import ds_file, losses_of, run
from tests.hosts import Hosts, hosts
from tests.integration.launching import ROOT
from tests.worlds import World

__all__ = ["make_config", "pairs"]

pytestmark = pytest.mark.distributed(2)

SECONDS = 200  # a launch takes 12 on quiet cores; a hang ends here
LIMIT_SECONDS = 18.0  # timeout_minutes of the run that is cut off
STEPS = 24
SHORT = {"max_steps": 3, "val_data_path": None, "eval_steps": 0, "gradient_self_test": False}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(2, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def one_host() -> Iterator[World]:
    """Two ranks without a past, ZeRO-2 before ZeRO-3: who has run ZeRO-3 multiplies by another function of DeepSpeed's, and rounds by it."""
    running = World(2)
    yield running
    running.close()


def command(machines: Hosts, *arguments: str) -> list[str]:
    """``vembed-ds``, typed on the first machine."""
    return machines.inside(0, ["python", "-m", "vembed_ds", *arguments])


def train(machines: Hosts, config: str, stage: int, *more: str) -> list[str]:
    world = ["--hostfile", str(machines.hostfile())]
    return command(
        machines, "train", *world, "--ds_config", ds_file(stage), "--config", config, *more
    )


def finish(
    machines: Hosts, words: Sequence[str], *, seconds: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        cwd=ROOT,
        env=machines.environment(),
        text=True,
        capture_output=True,
        timeout=seconds,
        check=False,
    )


def require_same(found: Path, wanted: Path, *, step: int) -> None:
    """Losses and weights of two runs, bit for bit: two numbers have one sum, in either order."""
    assert losses_of(found) == losses_of(wanted)
    ours, theirs = (
        load_consolidated(folder / f"checkpoint-step-{step}") for folder in (found, wanted)
    )
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def test_two_machines_train_as_one(
    machines: Hosts, one_host: World, make_config: Callable[..., str], tmp_path: Path
) -> None:
    run(one_host, make_config(**SHORT, output_dir=str(tmp_path / "one")), 2)
    config = make_config(**SHORT, output_dir=str(tmp_path / "a folder with blanks"))
    done = finish(machines, train(machines, config, 2))
    assert done.returncode == 0, done.stderr[-3000:]
    require_same(tmp_path / "a folder with blanks", tmp_path / "one", step=3)


def test_a_machine_that_is_cut_off_is_named_and_the_run_goes_on_when_it_is_back(
    machines: Hosts, one_host: World, make_config: Callable[..., str], tmp_path: Path
) -> None:
    long = {**SHORT, "max_steps": STEPS, "save_steps": 4, "save_total_limit": 2}
    run(one_host, make_config(**long, output_dir=str(tmp_path / "whole")), 3)

    out = tmp_path / "cut"
    config = make_config(**long, output_dir=str(out), timeout_minutes=LIMIT_SECONDS / 60)
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            train(machines, config, 3),
            cwd=ROOT,
            env=machines.environment(),
            stdout=log,
            stderr=log,
        )
        wait_for(out / "latest", running, tmp_path / "log")
        machines.cut_off(1)
        started = time.monotonic()
        try:
            code = running.wait(timeout=SECONDS)
            seconds = time.monotonic() - started
            # It hears nothing, and ends too.
            while machines.processes(1, of="vembed_ds.train"):
                assert time.monotonic() - started < 2 * LIMIT_SECONDS + 10
                time.sleep(0.1)
        finally:
            machines.connect(1)
    said = (tmp_path / "log").read_text()
    assert code == 1, said[-3000:]
    assert seconds < 1.2 * LIMIT_SECONDS + 5, said[-3000:]
    assert re.search(
        r"rank 0: PeerError: rank 1 \(host host-1, pid \d+\) gave no sign of life for \d+ s, last seen "
        r"in '.*' \(limit: timeout_minutes=0.3\): stopped, cut off from the network",
        said,
    ), said[-3000:]
    assert len(losses_of(out)) < STEPS, "it was over before the machine was cut off"

    done = finish(machines, train(machines, config, 3, "--resume", "auto"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr
    require_same(out, tmp_path / "whole", step=STEPS)


def wait_for(path: Path, running: subprocess.Popen[bytes], log: Path) -> None:
    started = time.monotonic()
    while not path.exists():
        assert running.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() - started < SECONDS, log.read_text()[-3000:]
        time.sleep(0.02)


def test_a_machine_that_does_not_answer_is_named_before_anything_starts(
    machines: Hosts, make_config: Callable[..., str], tmp_path: Path
) -> None:
    machines.cut_off(1)
    try:
        done = finish(machines, train(machines, make_config(**SHORT), 2), seconds=60)
    finally:
        machines.connect(1)
    assert done.returncode == 2
    address = machines.addresses[1]
    assert re.search(
        rf"ConfigError: {address}: cannot be reached: .*(No route to host|timed out); try `ssh {address} "
        r"hostname`, which must ask for no password",
        done.stderr,
    ), done.stderr
    assert "nothing was started" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_doctor_looks_at_both(machines: Hosts, tmp_path: Path) -> None:
    world = ["--hostfile", str(machines.hostfile()), "--output_dir", str(tmp_path)]
    done = finish(machines, command(machines, "doctor", *world))
    assert done.returncode == 0, done.stdout + done.stderr
    for number, address in enumerate(machines.addresses):
        assert f"ssh ({address}) answers as host-{number}" in " ".join(done.stdout.split()), (
            done.stdout
        )
        assert f"packages (host-{number})" in done.stdout
    assert "the same on 2 ranks" in done.stdout
    assert "ok    shared folder " in done.stdout
    assert "2 ranks, gloo: right" in done.stdout
