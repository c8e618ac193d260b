"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.names import lies_in
from vembed_ds.checkpointing.store import STATE, find_checkpoint
from vembed_ds.config.schema import ALIASES, Config
from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError, ConfigError, counted
from vembed_ds.training.changes import (
    ALLOW,
    check_allowed,
    check_changes,
    describe_changes,
    find_changes,
    flat_ds_config,
    flat_settings,
)
from vembed_ds.training.data_setup import RunData, dataset_entries
from vembed_ds.training.loop import Intervals

logger = logging.getLogger(__name__)

SETTINGS = "settings"
CONFIGURED = "configured_batch_size"
EARLIER = "earlier_parts"
EVALUATION_LEFT = "evaluation_left"
WINDOW = "log_window"
BATCH = "global_batch_size"
_MEMORY = "; if that does not fit into memory, set use_gradient_cache: true"

# May differ when a run is resumed: they change neither the samples nor the update.
FREE = frozenset(
    [
        "activation_checkpointing",
        "allow_image_urls",
        "allow_images_outside_root",
        "attn_implementation",
        "best_metric",
        "cache_frozen_encoder",
        "data_path",
        "encode_duplicates_once",
        "epochs",
        "eval_batch_size",
        "eval_on_start",
        "eval_recall_k",
        "eval_steps",
        "frozen_features_dir",
        "gradient_cache_chunk_size",
        "gradient_cache_chunk_tokens",
        "gradient_cache_kept_graphs",
        "gradient_cache_sort",
        "gradient_checkpointing",
        "gradient_checkpointing_slice_size",
        "gradient_reduction",
        "gradient_self_test",
        "image_root",
        "loader_timeout_seconds",
        "logging_steps",
        "loss_tile_size",
        "max_bad_records",
        "max_nonfinite_steps",
        "max_steps",
        "node_local_output",
        "num_workers",
        "on_nonfinite",
        "on_save_error",
        "output_dir",
        "persistent_workers",
        "pin_memory",
        "prefetch_factor",
        "replica_check_steps",
        "report_to",
        "run_name",
        "save_async",
        "save_epochs",
        "save_every_minutes",
        "save_steps",
        "save_total_limit",
        "spike_factor",
        "teacher_cache",
        "teacher_ds_config",
        "teacher_trust_remote_code",
        "timeout_minutes",
        "trust_remote_code",
        "use_gradient_cache",
        "use_torch_compile",
        "val_data_path",
        "zero3_gather",
    ]
)


@dataclass(frozen=True)
class Resumption:
    """The checkpoint that a run goes on from.

    Attributes:
        folder: Where it lies.
        state: Its ``trainer_state.json``.
        allowed: Settings that may differ, by name.
    """

    folder: Path
    state: Mapping[str, Any]
    allowed: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps that it has done."""
        return int(self.state["step"])

    @property
    def evaluation_left(self) -> bool:
        """Whether a signal stopped the run in the evaluation after this step."""
        return bool(self.state.get(EVALUATION_LEFT))

    @property
    def settings(self) -> Mapping[str, Any]:
        """From :func:`run_settings`, of the run that wrote it."""
        found: Mapping[str, Any] = self.state[SETTINGS]
        return found

    def belongs_to(self, output_dir: str) -> bool:
        """Whether it lies in this run's own folder, whose metrics then go on too."""
        return lies_in(self.folder, Path(output_dir))

    def own_folder(self, output_dir: str) -> Path | None:
        """Its folder, where it :meth:`belongs_to` this run."""
        return self.folder if self.belongs_to(output_dir) else None


@contextmanager
def chosen_checkpoint(
    resume: str | None,
    *,
    output_dir: str,
    allowed: Sequence[str] = (),
    node_local: bool = False,
) -> Iterator[Resumption | None]:
    """The checkpoint to go on from; ``None`` for a fresh start. Collective.

    Nobody deletes it before the block is left; a run that still writes beside it might.

    Args:
        resume: A checkpoint, a run's folder, ``"auto"``, or ``None``.
        output_dir: Of this run.
        allowed: Settings that may differ, by name.
        node_local: Every machine has its own part of the checkpoint.

    Raises:
        CheckpointError: On every rank: there is none, or it cannot be read.
        ConfigError: Changes are allowed, and nothing is resumed.
    """
    if resume is None:
        if allowed:
            raise ConfigError(f"{ALLOW} {' '.join(allowed)}: only with --resume; remove it")
        yield None
        return
    with ExitStack() as held:
        folder = find_checkpoint(resume, Path(output_dir), node_local=node_local, held=held)
        if folder is None:
            logger.warning("--resume auto: %s has no checkpoint; starting fresh", output_dir)
            yield None
            return
        state = comm.run_together(lambda: _read(folder), doing=f"reading {folder}")
        yield Resumption(folder, state, tuple(ALIASES.get(name, name) for name in allowed))


def keep_global_batch(config: Config, resumption: Resumption) -> Config:
    """The configuration with the batch of a rank that keeps the batch of all ranks.

    Raises:
        CheckpointError: This number of ranks does not divide it.
    """
    given, world_size = config.training.batch_size, comm.world_size()
    number = batch_per_rank(
        given,
        world_size=world_size,
        total=resumption.settings[BATCH],
        configured=resumption.state[CONFIGURED],
        may_change=BATCH in resumption.allowed,
    )
    if number == given:
        return config
    logger.warning(
        "batch_size: %d -> %d per rank, so that with %s the global batch stays %d%s",
        given,
        number,
        counted(world_size, "rank"),
        resumption.settings[BATCH],
        "" if number < given or config.training.use_gradient_cache else _MEMORY,
    )
    training = config.training.model_copy(update={"batch_size": number})
    return config.model_copy(update={"training": training})


def batch_per_rank(
    given: int, *, world_size: int, total: int, configured: int, may_change: bool
) -> int:
    """Pairs per rank of a resumed run.

    A ``batch_size`` that is still what it was when the run began means: the global batch of then.

    Args:
        given: ``batch_size`` now.
        world_size: Ranks now.
        total: Global batch of the checkpoint.
        configured: ``batch_size`` as it was written in the checkpoint's configuration.
        may_change: Whether another global batch is allowed by name.

    Raises:
        CheckpointError: The ranks do not divide the global batch.
    """
    if may_change or given != configured:
        return given
    if total % world_size:
        possible = [str(n) for n in range(1, 2 * world_size + 1) if total % n == 0]
        raise CheckpointError(
            f"batch_size={given}: the checkpoint's global batch of {total} does not divide by "
            f"{counted(world_size, 'rank')}; start {_one_of(possible)} ranks, or set batch_size and add "
            f"{ALLOW} {BATCH}"
        )
    return total // world_size


def run_settings(
    config: Config, ds_config: Mapping[str, Any], data: RunData, intervals: Intervals
) -> dict[str, Any]:
    """Everything that was set, and what follows from it, by names that ``--allow_change`` takes."""
    names = list(dataset_entries(config.data))
    digests = data.fingerprint.split("+")
    return {
        **flat_settings(config.model_dump(mode="json")),
        **flat_ds_config(ds_config),
        "world_size": comm.world_size(),
        BATCH: ds_config["train_batch_size"],
        "num_steps": intervals.num_steps,
        "num_records": data.num_records,
        "data_fingerprint": dict(zip(names, digests, strict=True)) if digests[1:] else digests[0],
    }


def earlier_parts(
    resumption: Resumption | None, settings: Mapping[str, Any]
) -> list[dict[str, int]]:
    """Which steps were made on other ranks or at another ZeRO stage, for the model's card.

    Args:
        resumption: What the run goes on from; ``None``: a fresh run.
        settings: From :func:`run_settings`.

    Returns:
        In their order, ``until_step``, ``world_size`` and ``zero_stage`` of each.
    """
    if resumption is None:
        return []
    parts: list[dict[str, int]] = list(resumption.state.get(EARLIER, ()))
    before, now = _ran_on(resumption.settings), _ran_on(settings)
    return parts if before == now else [*parts, {"until_step": resumption.step, **before}]


def _ran_on(settings: Mapping[str, Any]) -> dict[str, int]:
    return {
        "world_size": settings["world_size"],
        "zero_stage": settings.get("zero_optimization.stage", 0),
    }


def check_resumption(
    resumption: Resumption, settings: Mapping[str, Any], *, num_steps: int, evaluates: bool
) -> bool:
    """Show what has changed, or refuse it; before a model is loaded.

    Args:
        resumption: The checkpoint.
        settings: From :func:`run_settings`.
        num_steps: Of the run.
        evaluates: Whether it has anything to evaluate.

    Returns:
        Whether anything is left to train or to evaluate.

    Raises:
        CheckpointError: A change that was not allowed.
        ConfigError: A name was allowed that no setting has.
    """
    saved, allowed = resumption.settings, resumption.allowed
    judges = {key: value for key, value in saved.items() if key.startswith(("teacher.", "guide."))}
    check_allowed(allowed, known={*saved, *settings})
    changes = find_changes(saved, {**judges, **settings}, free=FREE)
    check_changes(changes, allowed=allowed, checkpoint=resumption.folder)
    for name in sorted({*allowed} - {change.key for change in changes} - set(judges)):
        logger.warning("%s %s: it has not changed", ALLOW, name)
    logger.info(
        "resuming from %s, step %d of %d; changed since then: %s",
        resumption.folder,
        resumption.step,
        num_steps,
        describe_changes(changes, allowed=allowed) or "nothing",
    )
    if resumption.step < num_steps or (evaluates and resumption.evaluation_left):
        return True
    logger.warning(
        "%s: the run is complete, nothing is left to train; to train longer, raise epochs or "
        "max_steps and add %s num_steps",
        resumption.folder,
        ALLOW,
    )
    return False


def check_judges(resumption: Resumption, judges: Mapping[str, str]) -> None:
    """Refuse that another guide or teacher goes on judging.

    Args:
        resumption: The checkpoint.
        judges: Digests of what was loaded.

    Raises:
        CheckpointError: One has another digest, and was not allowed.
    """
    saved = {name: resumption.settings.get(name, digest) for name, digest in judges.items()}
    changes = find_changes(saved, judges, free=())
    check_changes(changes, allowed=resumption.allowed, checkpoint=resumption.folder)
    if changes:
        logger.info("changed too: %s", describe_changes(changes, allowed=resumption.allowed))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        int(state["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); resume from an earlier checkpoint-step-N folder"
        ) from error
    if SETTINGS not in state:
        raise CheckpointError(
            f"{folder}: an earlier version wrote it, whose settings cannot be compared; resume with "
            "that version, or begin a new run from the converted model"
        )
    return state


def _one_of(numbers: Sequence[str]) -> str:
    return (
        " or ".join(numbers) if len(numbers) < 3 else f"{', '.join(numbers[:-1])} or {numbers[-1]}"
    )
