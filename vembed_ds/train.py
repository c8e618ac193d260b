"""Train: ``deepspeed --num_gpus 8 --module vembed_ds.train --ds_config DS --config YAML``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

EXIT_ERROR = 2  # a problem the user can mend
EXIT_UNEXPECTED = 1  # with a traceback
SHUTDOWN_SECONDS = 10
JOIN_MINUTES = 1.0  # for the other ranks, when this one already knows that it must end

EXAMPLES = """examples:
  deepspeed --num_gpus 8 --module vembed_ds.train --ds_config ds_configs/zero2.json --config my.yaml
  python -m vembed_ds.train --ds_config ds_configs/zero0.json --config my.yaml \\
      --config_override lr=1e-4 batch_size=64
  ... --resume auto      go on from the newest checkpoint of output_dir
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, set up this rank, train; returns the exit code."""
    arguments = _parse(argv)
    _quiet()
    # Imported late: `--help` and a mistyped flag need no torch.
    from vembed_ds.distributed import comm

    code = _run(arguments)
    if code and not comm.shutdown(timeout_seconds=SHUTDOWN_SECONDS):
        os._exit(code)  # the others wait for this rank in a collective: let them see it gone
    comm.shutdown()
    return code


def _run(arguments: argparse.Namespace) -> int:
    """Train; an error is printed with its rank before anything waits for other ranks."""
    from vembed_ds.config.loading import config_notices, load_config, setting_origins
    from vembed_ds.distributed import comm
    from vembed_ds.engine.ds_config import load_ds_config
    from vembed_ds.errors import VembedError

    mistake: VembedError | None = None
    timeout_minutes = JOIN_MINUTES
    try:
        config = load_config(arguments.config, arguments.config_override)
        origins = setting_origins(arguments.config, arguments.config_override)
        if comm.is_main():
            _tell(config_notices(arguments.config, arguments.config_override))
        ds_config = load_ds_config(arguments.ds_config)
        timeout_minutes = config.run.timeout_minutes
    except VembedError as error:
        mistake = error
        _report(error)
    try:
        _start(timeout_minutes)
        # The launcher ends all ranks as soon as one exits: a later one would never say why.
        comm.raise_together(mistake)
        from vembed_ds.training.run import train

        train(
            config,
            ds_config,
            ds_origin=str(arguments.ds_config),
            resume=arguments.resume,
            origins=origins,
        )
    except VembedError as error:
        if error is not mistake:
            _report(error)
        return EXIT_ERROR
    except Exception:  # noqa: BLE001 (whatever it is, this process ends with it)
        if mistake is not None:  # the others did not come; what is wrong has been said
            return EXIT_ERROR
        trace = traceback.format_exc()
        sys.stderr.write(f"vembed_ds: rank {comm.rank()} ended by an unexpected error:\n{trace}\n")
        sys.stderr.flush()
        return EXIT_UNEXPECTED
    return 0


def _report(error: Exception) -> None:
    from vembed_ds.distributed import comm

    text = str(error).replace("\n", "\n  ")
    sys.stderr.write(f"vembed_ds: rank {comm.rank()}: {type(error).__name__}: {text}\n")
    sys.stderr.flush()


def _tell(notices: Sequence[str]) -> None:
    for notice in notices:
        logging.getLogger("vembed_ds").warning("%s", notice)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vembed_ds.train",
        description="Train an embedding model on DeepSpeed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--ds_config", type=Path, required=True, help="DeepSpeed JSON file")
    parser.add_argument(
        "--config_override",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values that win over the YAML file",
    )
    parser.add_argument(
        "--resume", metavar="PATH|auto", help="checkpoint or run folder to go on from"
    )
    parser.add_argument("--local_rank", type=int, help="set by the DeepSpeed launcher")
    arguments = parser.parse_args(argv)
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    return arguments


def _start(timeout_minutes: float) -> None:
    """Pick this rank's device, or its share of the cores, and join the other ranks."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from vembed_ds.distributed import comm

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(comm.local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        # Every rank would start a thread per core, and they would wait for each other.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // comm.local_world_size()))
    comm.init_distributed(device_type=accelerator.device_name(), timeout_minutes=timeout_minutes)
    level = logging.INFO if comm.is_main() else logging.ERROR
    logging.getLogger("vembed_ds").setLevel(level)


def _quiet() -> None:
    """Our own log lines, on standard error; other libraries from warnings up."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
