"""What the commands share that run on every rank: flags, start-up, one readable error per rank.

Torch is imported late: ``--help`` and a mistyped flag need none.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vembed_ds.config.schema import Config
    from vembed_ds.errors import VembedError

# With a traceback; or a rank or loader process died or hung, replicas differ, or a disk or file
# server failed in a way that may pass: a restart may help.
EXIT_UNEXPECTED = 1
EXIT_ERROR = 2  # a problem the user can mend: a restart does not help
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, to be gone on with
EXIT_CODES = """exit codes:
  0    done
  1    unexpected, or a rank or loader process died or hung, the ranks' models differ, or a disk or file
       server gave an input/output error: starting again with --resume auto may help
  2    something is to be mended first; the message says what
  75   stopped by SIGTERM, SIGINT or SIGUSR1 with a checkpoint: to go on, start again with --resume auto
"""
SHUTDOWN_SECONDS = 10
LOG_FORMAT, LOG_TIME = "%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"
JOIN_MINUTES = 1.0  # for the other ranks, when this one already knows that it must end


class Prepared(NamedTuple):
    """What a rank does once all have joined, and how long it waits for them."""

    timeout_minutes: float
    work: Callable[[], object]


def positive_number(text: str) -> int:
    """The type of an argument that is a whole number from 1 on."""
    return _number_from(1, text)


def number_from_0(text: str) -> int:
    """The type of an argument that is a whole number, or 0."""
    return _number_from(0, text)


def _number_from(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from {least} on")
    return int(text)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name a run, and the launcher's own."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "--config_override",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values that win over the YAML file",
    )
    parser.add_argument("--local_rank", type=int, help="set by the DeepSpeed launcher")


def announce_rank(arguments: argparse.Namespace) -> None:
    """What the launcher says in a flag, where everything else looks for it."""
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))


def load_run(arguments: argparse.Namespace) -> Config:
    """The configuration that the flags name; rank 0 says what it should be told of it.

    Raises:
        ConfigError: It is wrong.
    """
    from vembed_ds.config.loading import config_notices, load_config
    from vembed_ds.distributed import comm

    config = load_config(arguments.config, arguments.config_override)
    if comm.is_main():
        _tell(config_notices(arguments.config, arguments.config_override))
    return config


def run_on_ranks(prepare: Callable[[], Prepared]) -> int:
    """Set up this rank and do its work; an error is printed with its rank before any waiting.

    Args:
        prepare: Reads what this rank can read alone, before it joins the others.

    Returns:
        The exit code. A rank that the others still wait for exits here.
    """
    _quiet()
    from vembed_ds.distributed import announced, comm, launcher
    from vembed_ds.errors import VembedError

    try:
        announced.adopt_environment()
    except VembedError as error:
        _report(error)
        return EXIT_ERROR
    code = _run(prepare)
    if code == EXIT_STOPPED:
        _ignore_signals([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    launcher.tell("exit", code)
    if code and not comm.shutdown(timeout_seconds=SHUTDOWN_SECONDS):
        os._exit(code)  # the others wait for this rank in a collective: let them see it gone
    comm.shutdown()
    return code


def exit_code(error: BaseException | None) -> int:
    """The code that an error ends the command with; another rank's error counts as its own."""
    from vembed_ds.errors import (
        DistributedError,
        PeerError,
        ReplicaError,
        StoppedError,
        StorageError,
        VembedError,
        WorkerError,
    )

    if isinstance(error, StoppedError):
        return EXIT_STOPPED
    if isinstance(error, PeerError | WorkerError | ReplicaError | StorageError):
        return EXIT_UNEXPECTED
    if isinstance(error, DistributedError) and isinstance(error.__cause__, VembedError):
        return exit_code(error.__cause__)
    return EXIT_ERROR if isinstance(error, VembedError) else EXIT_UNEXPECTED


def _ignore_signals(numbers: Sequence[signal.Signals]) -> None:
    """The launcher sends SIGTERM to every rank as soon as one has ended."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _run(prepare: Callable[[], Prepared]) -> int:
    from vembed_ds.distributed import comm
    from vembed_ds.errors import VembedError

    mistake: VembedError | None = None
    prepared = Prepared(JOIN_MINUTES, lambda: None)
    try:
        prepared = prepare()
    except VembedError as error:
        mistake = error
        _report(error)
    try:
        lacking = _start(prepared.timeout_minutes)
        # The launcher ends all ranks as soon as one exits: a later one would never say why.
        comm.raise_together(mistake or lacking)
        prepared.work()
    except Exception as error:  # noqa: BLE001 (whatever it is, this process ends with it)
        if mistake is not None:  # what is wrong has been said, though the others may not have come
            return EXIT_ERROR
        _ignore_signals([signal.SIGTERM])  # until it is said what happened
        return _end_by(comm.explain(error) or error)
    return 0


def _end_by(error: Exception) -> int:
    """Tell the user and the other ranks; gives the exit code."""
    from vembed_ds.distributed import comm
    from vembed_ds.errors import VembedError

    code = exit_code(error)
    if isinstance(error, VembedError):
        _report(error)
    else:
        trace = "".join(traceback.format_exception(error))
        sys.stderr.write(f"vembed_ds: rank {comm.rank()} ended by an unexpected error:\n{trace}\n")
        sys.stderr.flush()
    comm.say_last_words(error, code=code)
    return code


def _report(error: Exception) -> None:
    from vembed_ds.distributed import comm
    from vembed_ds.errors import StoppedError

    text = str(error).replace("\n", "\n  ")
    name = "" if isinstance(error, StoppedError) else f"{type(error).__name__}: "
    sys.stderr.write(f"vembed_ds: rank {comm.rank()}: {name}{text}\n")
    sys.stderr.flush()


def _tell(notices: Sequence[str]) -> None:
    for notice in notices:
        logging.getLogger("vembed_ds").warning("%s", notice)


def _missing_device(kind: str, count: int) -> VembedError | None:
    """What to tell all ranks, when this machine has no accelerator for this one."""
    from vembed_ds.distributed import comm
    from vembed_ds.errors import DistributedError, counted

    if kind == "cpu" or comm.local_rank() < count:
        return None
    return DistributedError(
        f"LOCAL_RANK={comm.local_rank()} on {platform.node()}: the rank sees "
        f"{counted(count, f'{kind} device')} and needs number {comm.local_rank()}; start at most "
        f"{counted(count, 'rank')} on this machine (--num_gpus, slots=), and hide none from its ranks "
        "(CUDA_VISIBLE_DEVICES; srun: --gpus-per-node instead of --gpus-per-task)"
    )


def _start(timeout_minutes: float) -> VembedError | None:
    from vembed_ds.distributed import comm

    lacking = start_rank(timeout_minutes)
    level = logging.INFO if comm.is_main() else logging.ERROR
    logging.getLogger("vembed_ds").setLevel(level)
    return lacking


def start_rank(timeout_minutes: float) -> VembedError | None:
    """Pick this rank's device, or its share of the cores, and join the other ranks. Collective.

    Args:
        timeout_minutes: As of :func:`comm.init_distributed`.

    Returns:
        What is wrong with this rank's device; to be raised on all ranks together.

    Raises:
        DistributedError: The ranks do not meet.
    """
    import torch
    from deepspeed.accelerator import get_accelerator

    from vembed_ds.distributed import comm

    accelerator = get_accelerator()
    lacking = _missing_device(accelerator.device_name(), accelerator.device_count())
    if accelerator.device_name() != "cpu":
        if lacking is None:
            accelerator.set_device(comm.local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        # Every rank would start a thread per core, and they would wait for each other.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // comm.local_world_size()))
    comm.init_distributed(device_type=accelerator.device_name(), timeout_minutes=timeout_minutes)
    return lacking


def _quiet() -> None:
    """Our own log lines, on standard error; other libraries from warnings up."""
    logging.basicConfig(format=LOG_FORMAT, datefmt=LOG_TIME)
    quiet_libraries()
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    others = os.environ.get("RANK", "0") != "0"
    if others:  # they ask the hub for the same as rank 0, and would repeat what it says
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if others or not sys.stderr.isatty():
        # The bars of several ranks overwrite each other, and in a file every state is a line.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _is_news(record: logging.LogRecord) -> bool:
    """Not that there is no accelerator: every process says so, and the run itself says what it runs on."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def quiet_libraries() -> None:
    """Other libraries tell warnings and errors only; before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # Stacks of torch's store, when a rank is gone, would stand before the sentence about it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
