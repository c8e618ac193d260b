"""Command: a checkpoint as a plain Hugging Face folder.

``python -m vembed_ds.convert CHECKPOINT OUT``; ``--adapter`` writes peft's files instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vembed_ds.checkpointing.consolidate import resolve_checkpoint
from vembed_ds.checkpointing.export import export_model
from vembed_ds.checkpointing.names import best_checkpoint
from vembed_ds.errors import VembedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the program's name; ``None``: those of the process.

    Returns:
        Exit code: 0, or 2 after an error, which is one line on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        place = best_checkpoint(options.checkpoint) if options.best else options.checkpoint
        checkpoint = resolve_checkpoint(place)
        export_model(
            checkpoint,
            options.out,
            adapter=options.adapter,
            trust_remote_code=options.trust_remote_code,
        )
    except (VembedError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.write(
        f"{checkpoint} -> {options.out} (float32)\n"
        f"load it: from vembed_ds import Encoder; encoder = Encoder({str(options.out)!r})\n"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vembed_ds.convert",
        description="Write a checkpoint of any ZeRO stage as a plain Hugging Face folder.",
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
        "--trust_remote_code",
        action="store_true",
        help="run Python code that the model brings, with your rights",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
