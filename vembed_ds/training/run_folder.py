"""A run's folder: it is this run's alone before anything in it is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.disks import this_disk
from vembed_ds.checkpointing.rotation import remove_leftovers
from vembed_ds.config.schema import Config, RunConfig
from vembed_ds.distributed import comm
from vembed_ds.run_lock import keep_output, lock_output
from vembed_ds.tracking.trackers import Tracker, build_tracker
from vembed_ds.training.output import (
    check_own,
    check_shared,
    list_skipped,
    open_output,
    prepare_output,
)
from vembed_ds.training.resuming import Resumption


def claim_output(run: RunConfig) -> None:
    """Lock the run's folder, made if need be, for this run. Collective.

    Until :func:`begin_output` nothing is left there if the run ends.

    Raises:
        VembedError: On every rank: another run is in the folder, not every rank can write there,
            or it is shared where it must not be, or the other way round.
    """
    folder, disk = Path(run.output_dir), this_disk(node_local=run.node_local_output)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]

    def claim() -> None:
        if disk.leads:
            lock_output(open_output(run.output_dir), made=missing)

    if run.node_local_output:
        check_own(folder, disk)
    comm.run_together(claim, doing=f"output_dir={run.output_dir!r}")
    if not run.node_local_output:
        check_shared(folder)


def begin_output(
    config: Config,
    ds_config: Mapping[str, Any],
    skipped: Sequence[str],
    *,
    resumption: Resumption | None,
) -> Tracker | None:
    """Write settings into the folder, remove what crashed runs left, open the trackers. Collective.

    Before the model, so that mistakes show early.

    Args:
        config: The configuration.
        ds_config: DeepSpeed's.
        skipped: What is said of records that are left out.
        resumption: What the run goes on from.

    Returns:
        On rank 0, the trackers.

    Raises:
        VembedError: On every rank.
    """
    run = config.run
    own = resumption is not None and resumption.belongs_to(run.output_dir)

    def begin() -> Tracker | None:
        if not this_disk(node_local=run.node_local_output).leads:
            return None
        keep_output()
        folder = prepare_output(config, ds_config, resuming=own)
        remove_leftovers(folder)
        if not comm.is_main():
            return None  # another machine's disk
        list_skipped(folder, skipped)
        return build_tracker(
            run.report_to,
            folder=folder,
            run_name=run.run_name,
            config=config.model_dump(mode="json"),
            resume_step=0 if resumption is None else resumption.step,
            patient=run.on_save_error == "warn",
        )

    return comm.run_together(begin, doing=f"output_dir={run.output_dir!r}")
