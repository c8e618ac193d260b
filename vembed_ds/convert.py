"""Command: a checkpoint as a plain Hugging Face folder.

``vembed-ds convert CHECKPOINT OUT``; ``--adapter`` writes peft's files instead.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vembed_ds.command import quiet_libraries
from vembed_ds.errors import VembedError

if TYPE_CHECKING:
    from vembed_ds.checkpointing.planning import Options, Plan

_EXIT_ERROR = 2
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as `precision` has them
_EXAMPLES = """
examples:
  vembed-ds convert outputs/run models/mine              the run's latest checkpoint
  vembed-ds convert outputs/run/checkpoint-step-500 models/mine --dtype bfloat16
  vembed-ds convert outputs/run models/mine --dry_run    what would be written
  vembed-ds convert outputs/run models/mine --verify     and compare the embeddings
  vembed-ds convert outputs/run adapters/mine --adapter  of a run with use_lora

The folder appears whole or not at all, also when the command is stopped or the disk is full. An
existing one is never written into.

exit codes: 0 done; 2 something you can mend, or --verify found a difference; 128 + the signal's
number when stopped.
"""


class _StoppedError(BaseException):
    """A signal came; no handler of errors may take it for one."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the program's name; ``None``: those of the process.

    Returns:
        Exit code: 0; 2 after an error, which is one line on stderr; 128 + N after signal N.
    """
    options = build_parser().parse_args(arguments)
    try:
        with _signals_raise():
            return _run(options)
    except (VembedError, OSError) as error:
        _say_error(" ".join(str(error).split()))
        return _EXIT_ERROR
    except _StoppedError as stopped:
        whole = options.out.is_dir() and any(options.out.iterdir())
        outcome = "was written and not compared" if whole else "was not written"
        _say_error(f"stopped by {stopped}; {options.out} {outcome}")
        return 128 + stopped.number


def _run(options: argparse.Namespace) -> int:
    quiet_libraries()
    from vembed_ds.checkpointing.companions import describe_readers
    from vembed_ds.checkpointing.export import export_model
    from vembed_ds.checkpointing.files import resolve_checkpoint
    from vembed_ds.checkpointing.manifest import reading
    from vembed_ds.checkpointing.names import best_checkpoint
    from vembed_ds.checkpointing.planning import Options, plan_export

    place = best_checkpoint(options.checkpoint) if options.best else options.checkpoint
    wanted: dict[str, Any] = {
        "adapter": options.adapter,
        "dtype": options.dtype,
        "max_shard_size": options.max_shard_size,
        "trust_remote_code": options.trust_remote_code,
        "show_progress": True,
    }
    if options.dry_run:
        _say_plan(plan_export(place, Options(**wanted)), options.out)
        return 0
    checkpoint = resolve_checkpoint(place)
    with reading(checkpoint):
        export_model(checkpoint, options.out, **wanted)
        if options.verify:
            _verify(checkpoint, options.out, Options(**wanted))
    sys.stdout.write(
        f"{checkpoint} -> {options.out} ({options.dtype})\n"
        f"load it: from vembed_ds import Encoder; encoder = Encoder({str(options.out)!r})\n"
    )
    sys.stdout.writelines(f"{line}\n" for line in describe_readers(options.out))
    return 0


def _verify(checkpoint: Path, out: Path, options: Options) -> None:
    from vembed_ds.checkpointing.verifying import require_equal, verify_export

    found = verify_export(checkpoint, out, options)
    for one in found:
        sys.stdout.write(
            f"embeddings of {one.num_items} sample items by {one.reader}: differ from the trained "
            f"model's by up to {one.difference:.1e} (limit {one.limit:.0e})\n"
        )
        if one.rounding is not None:
            sys.stdout.write(
                f"{options.dtype} itself moves them by up to {one.rounding:.1e} (a component of a "
                "unit vector)\n"
            )
    require_equal(found, out)


def _say_plan(plan: Plan, out: Path) -> None:
    sizes = plan.sizes()
    lines = [f"{size:>16,}  {name}" for name, size in sizes.items()]
    sys.stdout.write(
        f"{plan.checkpoint} -> {out} ({plan.options.dtype}); nothing was written\n"
        f"           bytes  file\n" + "\n".join(lines) + "\n"
        f"{sum(sizes.values()):>16,}  in {len(sizes)} files of weights\n"
        f"and small files: {', '.join(plan.copied())}, README.md, and those of "
        "sentence-transformers and vembed-factory\n"
    )


def _say_error(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let the first signal end the work by an exception, so that what was begun is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        for one in _STOPPING:
            signal.signal(one, signal.SIG_IGN)  # or a second one would leave the cleaning undone
        raise _StoppedError(number)

    before = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vembed-ds convert",
        description="Write a checkpoint of any ZeRO stage as a plain Hugging Face folder, one "
        "tensor at a time.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint-step-N folder, or the output_dir with `latest`"
    )
    parser.add_argument(
        "--best", action="store_true", help="of an output_dir: what `best` names, not `latest`"
    )
    parser.add_argument("out", type=Path, help="new or empty folder")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapters of use_lora in peft's files; else they are merged",
    )
    parser.add_argument(
        "--dtype",
        type=lambda name: _DTYPES.get(name, name),
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="number format of the weights, or fp32, bf16, fp16 (default: float32, exact; "
        "vembed-factory's Predictor reads float32 and float16 only)",
    )
    parser.add_argument(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="largest safetensors file, as 500MB or 5GB (default: 5GB)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="list the files and their sizes, write nothing"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="embed sample items with the trained model and with the written one (both whole in "
        "memory, one after the other), and fail when they differ",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that the model brings, with your rights",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
