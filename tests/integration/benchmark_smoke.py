"""A small comparison, in a process of its own: its environment is that of the command.

``python -m tests.integration.benchmark_smoke FOLDER``: writes what was found there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.comparing import TIME, compare
from benchmarks.measuring import RankError, run_ranks
from benchmarks.meter import Meter
from benchmarks.options import Options
from benchmarks.ours_variants import cached, ours
from benchmarks.peers.encoder import contrastive, load_encoder
from benchmarks.peers.job import Job, Variant
from benchmarks.peers.ours import train
from benchmarks.peers.plain import Batch, drive
from benchmarks.report import write_report
from benchmarks.task import Task
from benchmarks.workloads.one_process import BASE, PLAIN, WORKLOAD

VARIANTS = [
    Variant(BASE, "plain", PLAIN),
    Variant("half a gradient", "plain", "tests.integration.benchmark_smoke:half_a_gradient"),
    Variant("somebody else", "gradcache", "benchmarks.peers.gradcache:luyug", code="gradcache"),
    ours("cached", cached()),
    Variant("stopped", "plain", "tests.integration.benchmark_smoke:stopped"),
]


def half_a_gradient(job: Job, meter: Meter) -> None:
    """What gathers its positives without gradient, and forgets to make up for it."""
    encoder = load_encoder(job)
    loss_function = partial(contrastive, temperature=job.task.temperature)

    def gradient(batch: Batch):  # type: ignore[no-untyped-def]
        loss = loss_function(encoder(**batch["query"]), encoder(**batch["positive"]).detach())
        loss.backward()
        return loss.detach()

    drive(job, meter, encoder, gradient)


def stopped(job: Job, meter: Meter) -> None:
    """Ours, told to stop behind its first step, as ``timeout`` or Ctrl-C would."""
    end = meter.end

    def end_and_stop() -> None:
        end()
        signal.raise_signal(signal.SIGTERM)

    meter.end = end_and_stop  # type: ignore[method-assign]
    train(job, meter)


def environment() -> dict[str, str]:
    return dict(os.environ)


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("no more")
    time.sleep(3600)


def main() -> None:
    folder = Path(sys.argv[1])
    options = Options(scratch=folder / "scratch", rounds=1, steps=1, quick=True)
    result = compare(Task(), VARIANTS, options, base=BASE, columns=TIME)
    write_report(folder, {"W1": (WORKLOAD, result)}, options=options, load=(0.0, 0.0))
    try:
        run_ranks(fail_on_rank_1, ranks=2)
        failure = ""
    except RankError as error:
        failure = str(error)
    environments = run_ranks(environment, ranks=2)
    found = {"failure": failure, "environments": environments}
    (folder / "world.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
