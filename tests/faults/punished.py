"""A training under ``launch/restart.sh``, and whoever kills it.

Startup takes 10 to 60 s on the two cores that the tests run on, so that a kill every 5 to 15 s
would never let it train: the seconds are counted from where an attempt begins to train.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.integration.launching import PROGRAMS, ROOT, free_port

PAUSES = (5.0, 15.0)  # seconds of training before the next signal
STOPPED = 75
VICTIMS = ("rank 0", "rank 1", "launcher", "deepspeed", "loader process")


def train(config: str, *, stage: int = 2) -> list[str]:
    """The command on 2 ranks, which goes on from its newest checkpoint."""
    return [
        *(str(PROGRAMS / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())),
        *("--module", "vembed_ds.train", "--ds_config", f"ds_configs/zero{stage}.json"),
        *("--config", config, "--resume", "auto"),
    ]


class Punished:
    """The restart loop around ``command``, which trains into ``output``.

    Its temporary files and its log lie in ``folder``.
    """

    def __init__(self, command: Sequence[str], *, folder: Path, output: Path) -> None:
        self.command, self.folder, self.output = list(command), folder, output
        self._attempt, self._begun_with = "", 0
        folder.mkdir(exist_ok=True)
        self.log = folder / "log"
        self.environment = {
            **os.environ,
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(folder),
            "VEMBED_RESTART_SECONDS": "1",
        }

    def start(self) -> subprocess.Popen[bytes]:
        """Run the loop once: until the training is complete, stopped or given up."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["bash", "launch/restart.sh", "9", *self.command],
                cwd=ROOT,
                env=self.environment,
                stderr=log,
                stdout=log,
                start_new_session=True,
            )

    def trains(self) -> bool:
        """Whether an attempt has made its first step."""
        told = "".join(path.read_text() for path in self.folder.glob("vembed-status-*"))
        attempt = next((line for line in told.splitlines() if line.startswith("pid ")), "")
        metrics = self.output / "metrics.jsonl"
        lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        if attempt != self._attempt:
            self._attempt, self._begun_with = attempt, lines
        return bool(attempt) and lines > self._begun_with

    def processes(self) -> dict[str, list[int]]:
        """What belongs to the attempt that runs now."""
        found: dict[str, list[int]] = {}
        for process in map(int, filter(str.isdigit, os.listdir("/proc"))):  # noqa: PTH208
            kind = self._kind(process)
            if kind:
                found.setdefault(kind, []).append(process)
        return found

    def _kind(self, process: int) -> str:
        try:
            environment = Path(f"/proc/{process}/environ").read_text(errors="replace")
            line = Path(f"/proc/{process}/cmdline").read_text(errors="replace")
        except OSError:
            return ""
        if f"VEMBED_STATUS_FILE={self.folder}/" not in environment:
            return ""
        words = line.split("\0")
        if words[1:4] == ["-u", "-m", "vembed_ds.train"]:
            variables = dict(pair.partition("=")[::2] for pair in environment.split("\0"))
            return f"rank {variables['LOCAL_RANK']}"
        if "deepspeed.launcher.launch" in words:
            return "launcher"
        if "vembed_ds.train" in words:
            return "deepspeed"
        return "loader process"  # or the server that they are forked from


def punish(run: Punished, *, seconds: float, seed: int) -> Counter[str]:
    """Disturb a training for ``seconds`` from where it begins, then let it come to its end.

    Returns:
        How often each thing was done.
    """
    choose, done = random.Random(seed), Counter[str]()
    loop = run.start()
    try:
        while loop.poll() is None and not run.trains():
            time.sleep(0.1)
        end = time.monotonic() + seconds
        while True:
            pause = time.monotonic() + choose.uniform(*PAUSES)
            while loop.poll() is None and time.monotonic() < pause:
                if not run.trains():
                    pause += 0.1
                time.sleep(0.1)
            if loop.poll() == STOPPED:
                done["started again"] += 1
                loop = run.start()
            elif loop.poll() is not None:
                assert loop.returncode == 0, run.log.read_text()[-5000:]
                return done
            elif time.monotonic() < end:
                done[_disturb(run, loop.pid, choose)] += 1
            else:
                loop.wait(timeout=600)
    finally:
        if loop.poll() is None:
            loop.kill()
        for processes in run.processes().values():
            for process in processes:
                os.kill(process, signal.SIGKILL)


def _disturb(run: Punished, loop: int, choose: random.Random) -> str:
    """Kill, or ask to stop; gives what was done."""
    found = run.processes()
    if choose.random() < 0.25:
        whom = choose.choice(["the loop", "rank 0", "rank 1"])
        processes = [loop] if whom == "the loop" else found.get(whom, [])
        number = choose.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        if whom != "the loop" and number == signal.SIGINT:
            number = signal.SIGTERM  # a background job's children ignore SIGINT
    else:
        whom, number = choose.choice(VICTIMS), signal.SIGKILL
        processes = found.get(whom, [])
    if not processes:
        return "found nobody"
    try:
        os.kill(choose.choice(processes), number)
    except ProcessLookupError:
        return "came too late"
    return f"{number.name} to {whom}"


@contextmanager
def nothing_left(run: Punished) -> Iterator[None]:
    """Whatever happens inside leaves no folder, process or shared memory behind."""
    before = {path.name for path in Path("/dev/shm").iterdir()}
    yield
    assert not run.processes()
    assert not list(run.folder.glob("vembed-status-*"))
    port = run.command[run.command.index("--master_port") + 1]
    new = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert not [name for name in new if port in name], new
    hidden = [path.name for path in run.output.iterdir() if path.name.startswith(".")]
    assert not hidden, f"left in {run.output}: {hidden}"
