"""Two ranks as two machines with a disk each: every rank is the first of its machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.distributed.train_cases import run_train
from tests.faults.checkpoint_cases import make_engine, make_saver, save_by, train_step
from vembed_ds.checkpointing.store import find_checkpoint
from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError


@contextmanager
def two_machines() -> Iterator[None]:
    """As launchers announce it."""
    usual = {name: os.environ[name] for name in ("LOCAL_RANK", "LOCAL_SIZE")}
    os.environ.update(LOCAL_RANK="0", LOCAL_SIZE="1")
    try:
        yield
    finally:
        os.environ.update(usual)


def disk(out: str) -> Path:
    """What this rank sees under the name that all machines use."""
    return Path(out) / f"disk-{comm.rank()}"


def save_on_disks(*, out: str, stage: int, steps: int) -> None:
    """A checkpoint after every step; the second is the best."""
    with two_machines():
        engine = make_engine(stage)
        saver = make_saver(
            engine, str(disk(out)), node_local=True, total_limit=2, best_metric="mrr"
        )
        for step in range(1, steps + 1):
            train_step(engine, step)
            saver.judge(step, {"eval/mrr": float(step == 2)})
            save_by(saver, step)
        engine.engine.destroy()


def find_on_disks(*, out: str, node_local: bool = True) -> dict[str, Any]:
    """What is resumed from, and what was warned of."""
    records: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Kept(logging.WARNING)
    logging.getLogger("vembed_ds").addHandler(handler)
    try:
        with two_machines():
            found = find_checkpoint("auto", disk(out), node_local=node_local)
        return {"found": found and found.name, "warned": "\n".join(records)}
    except VembedError as error:
        return {"error": str(error)}
    finally:
        logging.getLogger("vembed_ds").removeHandler(handler)


def train_on_disks(*, config: str, ds_config: str, out: str, **more: Any) -> dict[str, Any]:
    """A run whose ``output_dir`` is another one on each rank."""
    with two_machines():
        return run_train(
            config=config, ds_config=ds_config, overrides=[f"output_dir={disk(out)}"], **more
        )


def train_as_two_machines(*, config: str, ds_config: str) -> dict[str, Any]:
    """A run that is told of two machines, and has one folder."""
    with two_machines():
        return run_train(config=config, ds_config=ds_config)
