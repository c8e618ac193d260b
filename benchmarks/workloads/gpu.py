"""W8: on a GPU: BERT-base and a vision-language model of 2B, in bf16, with large batches.

Without a GPU it says so; ``--quick`` runs tiny shapes on a CPU, to see that it would.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.comparing import compare
from benchmarks.models import MODELS
from benchmarks.options import Options, Result, Row, Workload
from benchmarks.ours_variants import LEAN, STANDARD, cached, ours
from benchmarks.peers.job import Setting, Variant
from benchmarks.task import Task
from benchmarks.workloads.one_process import BASE, PLAIN, ST

# 16-bit rounding; a wrong gradient is off by more. Adam's first update turns where it rounds.
BF16 = Setting("cuda", bf16=True, warm_up=5, tolerance=2e-2, later_tolerance=5e-2)
STEPS = 20  # timed
# Dense bf16 FLOP/s by a part of the device's name, from the vendors' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
STAGE = 2  # the least of ours with float32 weights beside 16-bit ones
BERT_BASE = Task(layers=12, width=768, vocabulary=30_522, length=128, chunk=256)
VLM_2B = Task(
    kind="vlm",
    layers=28,
    width=1536,
    inner=8960,
    heads=12,
    vocabulary=151_936,
    length=64,
    pixels=224,
    chunk=32,
    lr=1e-6,
)
TASKS = {
    "BERT-base, 4k": replace(BERT_BASE, pairs=4096),
    "BERT-base, 32k": replace(BERT_BASE, pairs=32_768),
    "VLM 2B, 1k": replace(VLM_2B, pairs=1024),
}
WHOLE_AT_MOST = 4096  # pairs of BERT whose whole graph fits a large GPU
COLUMNS = {
    "samples/s": ("samples", "{:.0f}"),
    "MFU": ("mfu", "{:.1%}"),
    "seconds": ("seconds", "{:.2f}"),
    "ratio": ("ratio", "{:.2f}"),
    "peak GB": ("gpu_gb", "{:.1f}"),
}


def run(options: Options) -> Result:
    setting = BF16
    if not torch.cuda.is_available():
        if not options.quick:
            return Result(COLUMNS, [], ["No GPU here: skipped."])
        setting = replace_device(BF16)
    found = {
        shape: compare(
            task,
            variants(task),
            replace(options.within(shape), steps=options.steps if options.quick else STEPS),
            base="plain torch, cached",
            columns=COLUMNS,
            setting=setting,
        )
        for shape, task in TASKS.items()
    }
    rows = [
        _with_rates({**row, "shape": shape, "variant": f"{shape}: {row['variant']}"}, TASKS[shape])
        for shape, result in found.items()
        for row in result.rows
    ]
    columns = next(iter(found.values())).columns
    notes = [f"{shape}: {note}" for shape, result in found.items() for note in result.notes]
    if setting.device == "cpu":
        notes.append(
            "A CPU sums the gradient of BERT's one token type in bf16: weights in bf16, such as ours, fail."
        )
    return Result(columns, rows, notes, {shape: result.raw for shape, result in found.items()})


def variants(task: Task) -> list[Variant]:
    """Whoever can train the task."""
    text = task.kind == "text"
    chosen = [
        Variant("plain torch, cached", "plain", PLAIN, {"cached": True}),
        ours("cached", cached(**LEAN), stage=STAGE),
        ours("cached, as it comes", cached(), stage=STAGE),
    ]
    if text:
        chosen.append(Variant("sentence-transformers, cached", "st", ST, {"cached": True}))
    if text and task.pairs <= WHOLE_AT_MOST:
        chosen += [Variant(BASE, "plain", PLAIN), ours("standard step", STANDARD, stage=STAGE)]
    return chosen


def replace_device(setting: Setting) -> Setting:
    """The same on a CPU."""
    return setting._replace(device="cpu", warm_up=1)


def step_flops(task: Task) -> float:
    """Of forward and backward pass once: what has to be done, without recomputation.

    ``6 P T`` for P parameters of the layers and T tokens, and ``12 L W S`` per token for attention
    over S; of pictures by their tokens in the language model, the vision tower's work left out.
    """
    with torch.device("meta"):
        model = MODELS[task.kind](task.shape)
    layers = getattr(model, "language_model", model)
    embedded = layers.get_input_embeddings().weight.numel()
    parameters = sum(p.numel() for p in layers.parameters()) - embedded
    lengths = [task.length, task.length]
    if task.kind == "vlm":
        lengths[1] = (task.pixels // 28) ** 2
    return sum(
        task.pairs * length * (6 * parameters + 12 * task.layers * task.width * length)
        for length in lengths
    )


def _with_rates(row: Row, task: Task) -> Row:
    if row["status"] != "measured" or "gpu_mb" not in row:
        return row
    rates: Row = {"samples": task.pairs / row["seconds"], "gpu_gb": row["gpu_mb"] / 1024}
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if peak is not None:
        rates["mfu"] = step_flops(task) / row["seconds"] / peak
    return row | rates


WORKLOAD = Workload("on a GPU", run, ("gpu_gb", "samples"))
