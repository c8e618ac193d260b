"""What a rank does in the tests of saving: a tiny engine that trains, saves, and is killed."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vembed_ds.checkpointing import rotation, saving
from vembed_ds.checkpointing.saver import SavePolicy, Saver
from vembed_ds.checkpointing.saving import save_checkpoint
from vembed_ds.distributed import comm
from vembed_ds.durable import HashedFile
from vembed_ds.engine import checkpoint_files
from vembed_ds.engine.initialize import initialize_engine
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import VembedError

KILL_POINTS = (
    "model file",
    "shard of rank 0",
    "shard of rank 1",
    "manifest",
    "before rename",
    "between the renames",
    "after rename before latest",
)


class Tiny(nn.Module):
    """A few weights with a loss."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.layers(rows).square().mean()
        return found


def make_engine(stage: int, *, width: int = 16) -> TrainEngine:
    """A tiny engine with Adam, the same on every rank."""
    torch.manual_seed(0)
    model = Tiny(width)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    return initialize_engine(
        model, ds_config=config, param_groups=build_param_groups(model, weight_decay=0.0)
    )


def train_step(engine: TrainEngine, step: int) -> None:
    """One update on data of its own per step and rank."""
    generator = torch.Generator().manual_seed(2 * step + comm.rank())
    with engine.reduce_once():
        engine.backward(engine.engine(torch.randn(4, 8, generator=generator)))
    engine.step()


def describe(folder: Path) -> None:
    """Stands in for the description of a model."""
    folder.mkdir()
    (folder / "config.json").write_text('{"kind": "tiny"}')
    (folder / "parameters.json").write_text("{}")


def save(engine: TrainEngine, out: str | Path, step: int) -> Path:
    """As a run does."""
    return save_checkpoint(
        engine.engine,
        output_dir=Path(out),
        step=step,
        state={"seed": 1},
        describe=describe,
        config_digest="0123",
    )


def save_steps(*, out: str, stage: int, steps: int) -> None:
    """A checkpoint after every step."""
    engine = make_engine(stage)
    for step in range(1, steps + 1):
        train_step(engine, step)
        save(engine, out, step)
    engine.engine.destroy()


def save_and_die(*, out: str, point: str, background: bool = False) -> None:
    """Save after step 1 and 2; get killed while saving the second."""
    engine = make_engine(2)
    train_step(engine, 1)
    save(engine, out, 1)
    train_step(engine, 2)
    if point == "between the renames":
        save(engine, out, 2)
    _arm(point)
    if not background:
        save(engine, out, 2)
        return
    saver = make_saver(engine, out, background=True, timeout_minutes=1.0)
    save_by(saver, 2)
    saver.finish()


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(point: str) -> None:
    if point in ("model file", "shard of rank 0", "shard of rank 1"):
        rank = int(point[-1]) if point[-1].isdigit() else 0
        wanted = f"zero_pp_rank_{rank}" if point[-1].isdigit() else "mp_rank_00_model"
        write = checkpoint_files.write_hashed

        def half(path: Path, action: Callable[[HashedFile], None]) -> Any:
            if path.name.startswith(wanted):
                write(path, action)
                os.truncate(path, path.stat().st_size // 2)
                _die()
            return write(path, action)

        checkpoint_files.write_hashed = half  # type: ignore[assignment]
    elif comm.is_main():
        if point == "manifest":

            def half_manifest(folder: Path, manifest: Any) -> None:
                (folder / "manifest.json").write_text(json.dumps({"format_version": 1})[:9])
                _die()

            saving.write_manifest = half_manifest
        elif point == "before rename":
            saving.put_in_place = _die
        elif point == "between the renames":
            rotation.sync_folder = _die
            partial_rename = Path.rename

            def second(self: Path, target: Path) -> Path:
                if self.name.endswith(".partial"):
                    _die()
                return partial_rename(self, target)

            Path.rename = second  # type: ignore[assignment, method-assign]
        else:
            saving.move_pointer = _die  # type: ignore[assignment]


def full_disk(*, out: str, stage: int, limited_rank: int | None) -> dict[str, Any]:
    """Save, find no room for the next, see what is left, go on, and save again.

    With ``limited_rank`` that rank alone may write no large files for a while; without, the disk
    that ``out`` lies on is filled.
    """
    engine = make_engine(stage, width=2000)
    train_step(engine, 1)
    save(engine, out, 1)
    train_step(engine, 2)
    before = weights(engine)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    filler = Path(out) / "filler"
    if limited_rank is None:
        if comm.is_main():
            fill(filler)
        comm.barrier()
    elif comm.rank() == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))
    try:
        save(engine, out, 2)
        error = None
    except VembedError as found:
        error = f"{type(found).__name__}: {found}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    comm.barrier()
    left = sorted(path.name for path in Path(out).iterdir() if path != filler)
    comm.barrier()
    if comm.is_main():
        filler.unlink(missing_ok=True)
    after = weights(engine)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    train_step(engine, 3)
    save(engine, out, 3)
    engine.engine.destroy()
    return {"error": error, "left": left, "unchanged": unchanged}


def fill(path: Path) -> None:
    """Write until the disk has room for a quarter of a checkpoint."""
    with path.open("wb") as file:
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_bsize
        file.write(b"x" * max(free - 60_000, 0))


def weights(engine: TrainEngine) -> dict[str, Tensor]:
    """Copies of this rank's parameters and optimizer states."""
    found = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    inner = getattr(engine.engine.optimizer, "optimizer", engine.engine.optimizer)
    for number, state in enumerate(inner.state.values()):
        for name in ("exp_avg", "exp_avg_sq"):
            found[f"{number}.{name}"] = state[name].detach().clone()
    return found


def make_saver(engine: TrainEngine, out: str, **policy: Any) -> Saver:
    """The saver of a run."""
    return Saver(engine.engine, output_dir=Path(out), policy=SavePolicy(**policy))


def save_by(saver: Saver, step: int) -> None:
    """As a run does."""
    saver.save(step, state={"seed": 1}, describe=describe, write=lambda folder: None)


def evaluated(*, out: str, values: list[float], **policy: Any) -> list[bool]:
    """Train and save after every step, or when an evaluation is the best; what was the best."""
    engine = make_engine(1)
    saver = make_saver(engine, out, **policy)
    judged = []
    for step, value in enumerate(values, 1):
        train_step(engine, step)
        judged.append(saver.judge(step, {"eval/recall@10": value, "eval/mrr": 1 - value}))
        save_by(saver, step)
    saver.finish()
    saver.close()
    engine.engine.destroy()
    return judged


def save_both_ways(*, out: str, stage: int) -> list[str]:
    """Save step 2 at once and in the background, while training goes on; names of the threads.

    The background's files are held back until training has changed every tensor.
    """
    engine = make_engine(stage)
    train_step(engine, 1)
    train_step(engine, 2)
    save(engine, Path(out) / "now", 2)
    saver = make_saver(engine, str(Path(out) / "later"), background=True)
    go_on, threads = threading.Event(), []
    write = checkpoint_files.write_hashed

    def held_back(path: Path, action: Callable[[HashedFile], None]) -> Any:
        assert go_on.wait(60)
        threads.append(threading.current_thread().name)
        return write(path, action)

    checkpoint_files.write_hashed = held_back  # type: ignore[assignment]
    try:
        save_by(saver, 2)
        for step in range(3, 6):  # collectives of both threads at once
            train_step(engine, step)
        go_on.set()
        train_step(engine, 6)
        saver.finish()
    finally:
        checkpoint_files.write_hashed = write
        saver.close()
    engine.engine.destroy()
    return threads


def fail_in_background(*, out: str, on_error: str) -> dict[str, Any]:
    """Rank 1 cannot write the second of three checkpoints; what each call said."""
    engine = make_engine(2)
    saver = make_saver(
        engine, out, background=True, on_error=on_error, best_metric="mrr", timeout_minutes=1.0
    )
    write = checkpoint_files.write_hashed

    def full(path: Path, action: Callable[[HashedFile], None]) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    errors = []
    for step in range(1, 4):
        train_step(engine, step)
        try:
            saver.judge(step, {"eval/mrr": step / 10})
            save_by(saver, step)
            if step == 1:
                saver.finish()
        except VembedError as error:
            errors.append(f"at {step}: {error}")
        if step == 2:
            wait([saver._unfinished[0]])  # type: ignore[index]
            checkpoint_files.write_hashed = write
        elif step == 1 and comm.rank() == 1:
            checkpoint_files.write_hashed = full  # type: ignore[assignment]
    saver.finish()
    saver.close()
    engine.engine.destroy()
    return {"errors": errors, "best": saver.best}
