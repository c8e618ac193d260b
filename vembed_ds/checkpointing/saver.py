"""The checkpoints of a run: which stay, what happens when one cannot be written, and in which thread."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from vembed_ds.checkpointing.disks import this_disk
from vembed_ds.checkpointing.names import (
    BEST,
    checkpoint_name,
    lies_in,
    move_pointer,
    read_pointer,
)
from vembed_ds.checkpointing.rotation import rotate
from vembed_ds.checkpointing.saving import Snapshot, commit, take_snapshot
from vembed_ds.checkpointing.store import STATE
from vembed_ds.distributed import comm, launcher
from vembed_ds.errors import ConfigError, SaveError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        metric: Its name, as in the configuration.
        value: The higher, the better.
        step: Optimizer steps that were done.
    """

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class SavePolicy:
    """What a configuration says of checkpoints.

    Attributes:
        total_limit: Newest checkpoints to keep beside the best; ``None``: all.
        best_metric: Metric of the evaluation whose best checkpoint is kept; ``None``: none.
        on_error: Whether a checkpoint that cannot be written ends the run or is warned of.
        background: Write in another thread, while training goes on.
        timeout_minutes: Longest wait of that thread for another rank.
        node_local: The run's folder is every machine's own.
    """

    total_limit: int | None = None
    best_metric: str | None = None
    on_error: str = "fail"
    background: bool = False
    timeout_minutes: float = 30.0
    node_local: bool = False


class Saver:
    """Saves checkpoints of one run. Every method is collective.

    Args:
        engine: The engine to save.
        output_dir: Folder of the run.
        policy: What is kept, and how it is written.
        config_digest: Of the run's configuration.
        best: The best evaluation so far, of a resumed run.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        *,
        output_dir: Path,
        policy: SavePolicy,
        config_digest: str | None = None,
        best: Best | None = None,
    ) -> None:
        self.engine, self.output_dir, self.policy = engine, output_dir, policy
        self.config_digest = config_digest
        self.best = best
        self._saved_best = best
        self._disk = this_disk(node_local=policy.node_local)
        self._writer: ThreadPoolExecutor | None = None
        self._group: Any = None
        self._unfinished: tuple[Future[Path], Best | None] | None = None
        self._newest: Path | None = None
        self._failure: SaveError | None = None

    def judge(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far, so that it is to be saved now.

        Args:
            step: Optimizer steps done.
            metrics: Of the evaluation, the same on every rank.

        Raises:
            ConfigError: There is no such metric.
            SaveError: As of :meth:`finish`.
        """
        name = self.policy.best_metric
        if name is None:
            return False
        self.finish()  # what could not be written is not the best one
        plain = {key.removeprefix("eval/"): value for key, value in metrics.items()}
        value = plain.get(name.removeprefix("eval/"))
        if value is None:
            raise ConfigError(
                f"best_metric={name!r}: the evaluation gives no such metric; take one of "
                f"{', '.join(sorted(plain))}"
            )
        if not math.isfinite(value) or (self.best is not None and value <= self.best.value):
            return False
        self.best = Best(name, float(value), step)
        return True

    def save(
        self,
        step: int,
        *,
        state: Mapping[str, Any],
        describe: Callable[[Path], None],
        write: Callable[[Path], None],
    ) -> Path | None:
        """Save a checkpoint; an earlier one that is still being written is waited for.

        Args:
            step: Optimizer steps done.
            state: As the others, of :func:`save_checkpoint`.
            describe: See there.
            write: See there.

        Returns:
            The newest checkpoint that is on the disk; ``None``: none of this run yet.

        Raises:
            SaveError: On every rank: this one, or an earlier one in the background, could not be
                written, and ``on_error`` is ``"fail"``.
        """
        self.finish()
        self._failure = None
        best = self.best
        if self.policy.best_metric is not None:
            state = {**state, "best": None if best is None else asdict(best)}
        snapshot = take_snapshot(
            self.engine,
            output_dir=self.output_dir,
            step=step,
            state=state,
            describe=describe,
            write=write,
            config_digest=self.config_digest,
            deferred=self.policy.background,
            disk=self._disk,
        )
        is_best = best is not None and best.step == step
        if self.policy.background:
            self._unfinished = (self._start(snapshot, is_best), best)
        else:
            self._settle(lambda: self._write(snapshot, is_best), best)
        return self._newest

    def finish(self) -> Path | None:
        """Wait until what is being written is on the disk.

        Returns:
            The newest checkpoint that was written; ``None``: none yet.

        Raises:
            SaveError: On every rank, as of :meth:`save`.
        """
        if self._unfinished is not None:
            (future, best), self._unfinished = self._unfinished, None
            self._settle(future.result, best)
        return self._newest

    def failure(self) -> SaveError | None:
        """Why the last checkpoint was not saved, as far as this rank knows. Local.

        It is the same on every rank behind :meth:`finish`.
        """
        if self._unfinished is not None and self._unfinished[0].done():
            error = self._unfinished[0].exception()
            return error if isinstance(error, SaveError) else None
        return self._failure

    def close(self) -> None:
        """Wait for what is being written, and say what became of it; for a run that ends anyway."""
        if self._unfinished is not None:
            error = self._unfinished[0].exception()
            self._unfinished = None
            if error is not None:
                logger.error("the last checkpoint was not saved: %s", error)
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def _start(self, snapshot: Snapshot, is_best: bool) -> Future[Path]:
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            if comm.world_size() > 1:
                self._group = comm.new_group(timeout_minutes=self.policy.timeout_minutes)

        def work() -> Path:
            with nullcontext() if self._group is None else comm.on_group(self._group):
                return self._write(snapshot, is_best)

        return self._writer.submit(work)

    def _settle(self, action: Callable[[], Path], best: Best | None) -> None:
        """See whether a checkpoint was written; the ranks agree on that already."""
        self._failure = None
        try:
            self._newest = action()
        except SaveError as error:
            self._failure = error
            if self.best == best:  # it lies nowhere
                self.best = self._saved_best
            if self.policy.on_error == "fail":
                raise type(error)(f"{error}, or let on_save_error: warn train on") from error
            if comm.is_main():
                logger.warning("on_save_error=warn: training goes on although %s", error)
        else:
            self._saved_best = best

    def _write(self, snapshot: Snapshot, is_best: bool) -> Path:
        folder = commit(snapshot, best=is_best)
        launcher.tell("saved", snapshot.step)
        if comm.is_main():
            logger.info("step %d: saved %s", snapshot.step, folder)
        if self._disk.leads:
            self._rotate()
        return folder

    def _rotate(self) -> None:
        if self.policy.total_limit is None:
            return
        try:
            rotate(self.output_dir, total_limit=self.policy.total_limit)
        except OSError as error:
            logger.warning("save_total_limit: an old checkpoint cannot be deleted: %s", error)


def resume_best(
    checkpoint: Path | None, output_dir: Path, *, metric: str | None, node_local: bool = False
) -> Best | None:
    """The best evaluation of the run that a checkpoint belongs to. Collective.

    ``best`` names its checkpoint afterwards. Where that is not in the run's folder (another
    folder's checkpoint was resumed from), there is no best one yet.

    Args:
        checkpoint: What is resumed from, verified; ``None``: a fresh run.
        output_dir: Folder of this run.
        metric: Of this run; another one's best says nothing.
        node_local: As of :class:`SavePolicy`.

    Raises:
        VembedError: On every rank: the folder cannot be written.
    """
    if checkpoint is None or metric is None:
        return None
    leads = this_disk(node_local=node_local).leads
    best = comm.run_together(
        lambda: _resume_best(checkpoint, output_dir, metric) if leads else None,
        doing=f"reading {checkpoint}",
    )
    found: Best | None = comm.all_gather_objects(best)[0]
    return found


def _resume_best(checkpoint: Path, output_dir: Path, metric: str) -> Best | None:
    saved = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("best")
    if saved is None or saved["metric"] != metric:
        return None
    best = Best(**saved)
    folder = output_dir / checkpoint_name(best.step)
    if not folder.is_dir():
        elsewhere = not lies_in(checkpoint, output_dir)
        logger.warning(
            "%s: the best checkpoint so far (%s=%g) %s; the next evaluation counts as the best",
            checkpoint.parent / folder.name if elsewhere else folder,
            metric,
            best.value,
            f"is another run's and not in {output_dir}" if elsewhere else "is not there",
        )
        return None
    if read_pointer(output_dir, BEST)[0] != folder:
        move_pointer(output_dir, BEST, folder)
    return best
