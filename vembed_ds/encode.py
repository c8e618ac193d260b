"""Command: the embeddings of a table as NumPy files, on every rank, resumable."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vembed_ds.command import Prepared, announce_rank, number_from_0, positive_number, run_on_ranks
from vembed_ds.run_lock import frees_output, lock_output

if TYPE_CHECKING:
    from vembed_ds.encoding.items import ItemTable
    from vembed_ds.encoding.run import Plan
    from vembed_ds.inference import Encoder

EXAMPLES = """examples:
  vembed-ds encode --model output/model --data corpus.jsonl --output vectors/corpus
  vembed-ds encode --model output/model --data 'shards/a-{000..127}.tar' --columns image=jpg id=__key__ \\
      --role document --output vectors/pictures
  vembed-ds encode --num_gpus 8 --model output/model --data corpus.parquet \\
      --precision bf16 --dims 256 --dtype float16 --output vectors/corpus

writes embeddings.npy (row i is row i of the data; open it with numpy.load(..., mmap_mode="r")), ids.parquet and
manifest.json; of a late-interaction model also offsets.npy: row i has the tokens offsets[i]:offsets[i + 1].
Killed at any time, the same command goes on with what is not done (docs/encode_and_mine.md).

exit codes:
  0    every row is embedded
  1    unexpected, or a rank or loader process died, or a disk gave an error: start again, it goes on
  2    something is to be mended first; the message says what
  130  stopped by Ctrl-C: start again, it goes on
"""
PRECISIONS = ("fp32", "bf16", "fp16")
TIMEOUT_MINUTES = 30.0
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, set up this rank, encode; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    announce_rank(arguments)
    try:
        return run_on_ranks(lambda: _prepare(arguments))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on with what is not done\n")
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vembed-ds encode",
        description="Embed every row of a table (JSONL, CSV, TSV, Parquet, WebDataset, a Hugging Face data set) "
        "with an exported or any Hugging Face model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="FOLDER",
        help="exported folder, or any Hugging Face model",
    )
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="DATA",
        help="files, patterns, folders or hub names",
    )
    add("--output", required=True, type=Path, metavar="FOLDER", help="new, empty, or begun before")
    add(
        "--role",
        choices=("auto", "query", "document"),
        default="auto",
        help="which instruction of the model comes before the items; auto: by the columns' names",
    )
    add("--instruction", metavar="TEXT", help="instead of the model's own instruction")
    add(
        "--columns",
        nargs="+",
        action="extend",
        default=[],
        type=_column,
        metavar="KEY=COLUMN",
        help="text=, image= (one or both) and id=; default: by the columns' names",
    )
    add(
        "--image_root",
        default="",
        metavar="FOLDER",
        help="where relative image paths start from; default: as stored with the model",
    )
    add("--allow_images_outside_root", action="store_true", help="let image paths leave image_root")
    add("--allow_image_urls", action="store_true", help="fetch images that are URLs")
    add(
        "--batch_size",
        type=positive_number,
        default=32,
        metavar="N",
        help="items of a rank at a time",
    )
    add(
        "--num_workers",
        type=number_from_0,
        default=4,
        metavar="N",
        help="loader processes per rank, at most",
    )
    add("--dtype", choices=("float32", "float16"), default="float32", help="of embeddings.npy")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the model's weights")
    add(
        "--dims", type=positive_number, metavar="N", help="keep the first N dimensions (Matryoshka)"
    )
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="scale every embedding, after --dims, to length 1",
    )
    add("--dry_run", action="store_true", help="say what would be written, and write nothing")
    add("--overwrite", action="store_true", help="replace embeddings that are in the folder")
    add("--trust_remote_code", action="store_true", help="run Python code that the model brings")
    add("--local_rank", type=int, help="set by the DeepSpeed launcher")
    return parser


def _prepare(arguments: argparse.Namespace) -> Prepared:
    return Prepared(TIMEOUT_MINUTES, lambda: run(arguments))


@frees_output
def run(arguments: argparse.Namespace) -> None:
    """Encode what the arguments name. Collective.

    Raises:
        VembedError: On every rank, for everything that a user can put right.
    """
    from vembed_ds.distributed import comm
    from vembed_ds.encoding.run import Options, encode_table, plan_encoding

    if not arguments.dry_run:
        comm.run_on_main(lambda: _lock(arguments.output), doing=f"--output {arguments.output}")
    encoder, items = _open(arguments)
    options = Options(
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        dtype=arguments.dtype,
        dims=arguments.dims,
        normalize=arguments.normalize,
        precision=arguments.precision,
    )
    plan = plan_encoding(
        encoder,
        items,
        folder=arguments.output,
        options=options,
        model_name=arguments.model,
        data_paths=arguments.data,
        overwrite=arguments.overwrite,
    )
    if comm.is_main():
        sys.stdout.write(_planned(plan, items) + "\n")
        sys.stdout.flush()
    if arguments.dry_run:
        _say("nothing was written")
        return
    encode_table(encoder, items, plan, options=options)
    _say(f"{plan.folder}: complete")


def _lock(folder: Path) -> None:
    """Two calls in one folder at a time would mark blocks as done that the other one takes away."""
    if folder.exists() and not folder.is_dir():
        return  # an error of its own follows
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock_output(folder, made=missing, setting="--output")


def _open(arguments: argparse.Namespace) -> tuple[Encoder, ItemTable]:
    """The model and the data; local, so each rank reads for itself and all hear of an error."""
    import torch
    from transformers.utils import logging as transformers_logging

    from vembed_ds.distributed import comm
    from vembed_ds.inference import Encoder

    transformers_logging.disable_progress_bar()
    dtypes = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16, torch.float16), strict=True))

    def work() -> tuple[Encoder, ItemTable]:
        encoder = Encoder(
            arguments.model,
            dtype=dtypes[arguments.precision],
            trust_remote_code=arguments.trust_remote_code,
        )
        return encoder, _open_items(arguments, encoder)

    return comm.run_together(work, doing="reading model and data")


def _open_items(arguments: argparse.Namespace, encoder: Encoder) -> ItemTable:
    from vembed_ds.encoding.items import (
        ItemTable,
        check_parts,
        choose_columns,
        load_items,
        stated_instruction,
    )

    origin = ", ".join(arguments.data)
    table = load_items(arguments.data, flag="--data")
    columns = choose_columns(
        table.column_names, role=arguments.role, given=dict(arguments.columns), origin=origin
    )
    model = encoder.model
    check_parts(columns, parts=model.parts, streams=model.streams, origin=origin)
    instruction = arguments.instruction
    if instruction is None:
        instruction = stated_instruction(encoder.settings, columns)
    return ItemTable(
        table,
        columns=columns,
        processor=encoder.processor,
        instruction=instruction,
        image_root=arguments.image_root or encoder.settings.get("image_root") or "",
        allow_images_outside_root=arguments.allow_images_outside_root,
        allow_image_urls=arguments.allow_image_urls,
        origin=origin,
    )


def _planned(plan: Plan, items: ItemTable) -> str:
    """What will be read and written, in a few lines."""
    manifest, identity = plan.manifest, plan.manifest.identity
    columns = ", ".join(f"{part} from {name!r}" for part, name in items.columns.parts.items())
    role = items.columns.role or "no role"
    if identity.tokens:
        size = f"a vector of {identity.dims} {identity.dtype} per token"
    else:
        from vembed_ds.encoding.store import VectorFile

        num_bytes = VectorFile(plan.folder, identity).num_bytes
        size = f"[{identity.count}, {identity.dims}] {identity.dtype}, {num_bytes:,} bytes"
    done = identity.count - plan.rows_left
    return (
        f"data: {items.origin}: {identity.count:,} rows, {columns} ({role}, instruction "
        f"{items.instruction!r}), id from {items.columns.id!r}\n"
        f"model: {manifest.names['model_name']} (fingerprint {identity.model})\n"
        f"output: {plan.folder}: {size}; {done:,} rows are done, {plan.rows_left:,} are left"
    )


def _say(text: str) -> None:
    from vembed_ds.distributed import comm

    if comm.is_main():
        sys.stdout.write(text + "\n")


def _column(text: str) -> tuple[str, str]:
    key, equals, column = text.partition("=")
    if not equals or not key or not column:
        raise argparse.ArgumentTypeError(f"{text!r}: write KEY=COLUMN, for example text=caption")
    return key, column


if __name__ == "__main__":
    sys.exit(main())
