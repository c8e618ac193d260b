"""W5: the loss alone (InfoNCE in both directions, 256 dimensions), from 1k to 16k pairs."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.comparing import absent
from benchmarks.measuring import RankError, memory, reset_peak, run_ranks
from benchmarks.options import Options, Result, Row, Workload
from benchmarks.peers.encoder import contrastive
from benchmarks.peers.job import CPU, Variant
from benchmarks.task import EXACT, Task, write_task

WIDTH, TEMPERATURE, ROWS = 256, 0.05, 512
SIZES, QUICK_SIZES = (1024, 2048, 4096, 8192, 16384), (256,)
FEW = 64  # pairs of a first call, which is not measured
NOISE = 2.0  # of a positive beside its query
MOST_WHOLE = 8192  # pairs whose whole matrices of similarities fit a small machine

Loss = Callable[[Tensor, Tensor], Tensor]  # of cosines; may differentiate by itself

HERE = "benchmarks.workloads.loss_memory"
VARIANTS = [
    Variant("plain torch", "plain", f"{HERE}:plain"),
    Variant("open_clip's ClipLoss", "open_clip", f"{HERE}:open_clip", code="open_clip_loss"),
    Variant("sentence-transformers, rows of 512", "st", f"{HERE}:sentence_transformers"),
    Variant("ours", "ours", f"{HERE}:ours"),
    Variant("ours, all at once", "ours", f"{HERE}:ours", {"loss_tile_size": None}),
]
BOUNDED = ("sentence-transformers, rows of 512", "ours")
COLUMNS = {
    "pairs": ("pairs", "{:d}"),
    "CPU s": ("cpu_seconds", "{:.2f}"),
    "ratio": ("ratio", "{:.2f}"),
    "peak MB": ("peak_mb", "{:.0f}"),
    "loss": ("loss", "{:.6f}"),
    "gradient norm": ("norm", "{:.6f}"),
    "error": ("error", "{:.0e}"),
}


def run(options: Options) -> Result:
    wanted = [v for v in VARIANTS if not options.peers or v.peer in {"plain", *options.peers}]
    present = [v for v in wanted if not v.code or v.code in options.code]
    options.scratch.mkdir(parents=True)
    write_task(Task().small(), options.scratch)  # a model for whoever wants one
    rows, raw = [], []
    for pairs in QUICK_SIZES if options.quick else SIZES:
        tried = [v for v in present if pairs <= MOST_WHOLE or v.name in BOUNDED]
        own, found = _compare(pairs, tried, options)
        rows += own
        raw.append(found)
    notes = absent(variant for variant in wanted if variant not in present)
    notes += [f"{r['variant']}, {r['pairs']} pairs: {r['reason']}" for r in rows if "reason" in r]
    notes.append(f"Above {MOST_WHOLE:,} pairs only what is meant for it (whole matrices: 6 GB).")
    return Result(COLUMNS, rows, notes, raw)


def _compare(
    pairs: int, variants: Sequence[Variant], options: Options
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the table, and everything measured, for batches of one size."""
    ((loss, norm),) = run_ranks(reference, pairs, ranks=1)
    found: dict[str, list[dict[str, float]]] = {v.name: [] for v in variants}
    failed: dict[str, str] = {}
    for number in range(options.rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            if variant.name in failed:
                continue
            try:
                found[variant.name] += run_ranks(measure, variant, pairs, options, ranks=1)
            except RankError as error:
                failed[variant.name] = str(error)
    rows = [
        _row(v, pairs, found[v.name], failed.get(v.name), loss=loss, norm=norm) for v in variants
    ]
    _add_ratios(rows)
    return rows, {"pairs": pairs, "expected": [loss, norm], "found": found}


def measure(variant: Variant, pairs: int, options: Options) -> dict[str, float]:
    """Loss and gradient of the same vectors, a few times, in this process."""
    module, _, name = variant.run.partition(":")
    build = getattr(importlib.import_module(module), name)
    loss_function: Loss = build(options, **variant.options)
    _differentiate(loss_function, vectors(FEW))  # what libraries make once is nobody's
    leaves = vectors(pairs)
    before = reset_peak()
    seconds = []
    for _ in range(1 + options.steps):
        started = time.process_time()
        loss = _differentiate(loss_function, leaves)
        seconds.append(time.process_time() - started)
    peak = memory("VmHWM") - before
    # A float32 sum of 8 million squares is off by 1e-4.
    norms = [float(leaf.grad.double().norm()) for leaf in leaves if leaf.grad is not None]
    return {
        "loss": float(loss.detach()),
        "norm": math.hypot(*norms),
        "cpu_seconds": median(seconds[1:]),
        "peak_mb": peak / 1024,
    }


def _differentiate(loss_function: Loss, leaves: Sequence[Tensor]) -> Tensor:
    """The loss; its gradient is in the leaves."""
    for leaf in leaves:
        leaf.requires_grad_().grad = None
    loss = loss_function(*leaves)
    if loss.requires_grad:  # else it is differentiated already
        loss.backward()
    return loss


def vectors(pairs: int) -> tuple[Tensor, Tensor]:
    """``[pairs, WIDTH]`` unit vectors of queries and of positives that are like them."""
    generator = torch.Generator().manual_seed(0)
    query, noise = (torch.randn(pairs, WIDTH, generator=generator) for _ in range(2))
    return functional.normalize(query, dim=1), functional.normalize(query + NOISE * noise, dim=1)


def reference(pairs: int) -> tuple[float, float]:
    """Loss and norm of the gradient in float64, from the formulas, a few rows at a time.

    ``L = (mean_i lse_j s_ij + mean_j lse_i s_ij) / 2 - mean_i s_ii``, so that
    ``dL/ds_ij = (p_ij + p'_ij) / 2B - [i = j] / B``, the softmax over rows and over columns.
    """
    query, positive = (rows.double() for rows in vectors(pairs))
    blocks = [slice(start, start + ROWS) for start in range(0, pairs, ROWS)]
    by_row, by_column = [], torch.full((pairs,), -torch.inf, dtype=torch.float64)
    for rows in blocks:
        scores = query[rows] @ positive.T / TEMPERATURE
        by_row.append(scores.logsumexp(dim=1))
        by_column = torch.logaddexp(by_column, scores.logsumexp(dim=0))
    diagonal = (query * positive).sum(dim=1) / TEMPERATURE
    loss = (torch.cat(by_row).mean() + by_column.mean()) / 2 - diagonal.mean()
    grad_query, grad_positive = torch.empty_like(query), torch.zeros_like(positive)
    for rows, own in zip(blocks, by_row, strict=True):
        scores = query[rows] @ positive.T / TEMPERATURE
        weights = ((scores - own[:, None]).exp() + (scores - by_column).exp()) / (2 * pairs)
        weights[range(len(own)), range(rows.start, rows.start + len(own))] -= 1 / pairs
        grad_query[rows] = weights @ positive / TEMPERATURE
        grad_positive += weights.T @ query[rows] / TEMPERATURE
    # Of unit vectors only what is across them moves a cosine.
    for grad, unit in ((grad_query, query), (grad_positive, positive)):
        grad -= (grad * unit).sum(dim=1, keepdim=True) * unit
    return float(loss), math.hypot(float(grad_query.norm()), float(grad_positive.norm()))


def plain(options: Options) -> Loss:
    """Two whole matrices of similarities."""
    return lambda *rows: contrastive(*_unit(rows), temperature=TEMPERATURE, symmetric=True)


def open_clip(options: Options) -> Loss:
    """The same by its class."""
    from benchmarks.peers.open_clip import load_loss

    loss, scale = load_loss(options.code["open_clip_loss"]), torch.tensor(1 / TEMPERATURE)
    return lambda *rows: loss(*_unit(rows), scale)


def _unit(rows: Sequence[Tensor]) -> list[Tensor]:
    """The other losses do it themselves."""
    return [functional.normalize(r, dim=1) for r in rows]


def sentence_transformers(options: Options) -> Loss:
    """Its cached loss, a block of rows at a time, each differentiated at once."""
    from benchmarks.peers import sentence_transformers_loss as st

    model = st.build_model(options.scratch / EXACT)
    loss = st.CachedMultipleNegativesRankingLoss(
        model, scale=1 / TEMPERATURE, mini_batch_size=ROWS, **st.BOTH
    )
    return lambda query, positive: loss.calculate_loss([[query], [positive]], with_backward=True)


def ours(options: Options, **keys: Any) -> Loss:
    """From a configuration, as a run builds it."""
    from vembed_ds.config.loading import parse_config
    from vembed_ds.losses import LossInputs
    from vembed_ds.similarity import Embeddings
    from vembed_ds.training.data_setup import dataset_entries
    from vembed_ds.training.loss_setup import build_losses, loss_configs

    config = parse_config(
        {
            "model_name": str(options.scratch / EXACT),
            "data_path": str(options.scratch / "pairs.jsonl"),
            "retrieval_mode": "t2t",
            "temperature": TEMPERATURE,
            "loss_bidirectional": True,
            **keys,
        }
    )
    configs = loss_configs(config.loss, dataset_entries(config.data))
    tile = config.training.loss_tile_size
    (loss,) = build_losses(configs, config.distillation, num_steps=1, tile_size=tile)
    return lambda query, positive: loss(LossInputs(Embeddings(query), Embeddings(positive)))


def _row(
    variant: Variant,
    pairs: int,
    found: list[dict[str, float]],
    failure: str | None,
    *,
    loss: float,
    norm: float,
) -> Row:
    row: Row = {"variant": variant.name, "peer": variant.peer, "pairs": pairs}
    if failure is not None:
        return row | {"status": "failed", "reason": failure}
    error = max(
        abs(f[key] / right - 1) for f in found for key, right in (("loss", loss), ("norm", norm))
    )
    row |= {"loss": found[0]["loss"], "norm": found[0]["norm"], "error": error}
    if not error <= CPU.tolerance:
        return row | {"status": "wrong"}
    figures = {key: median(f[key] for f in found) for key in ("cpu_seconds", "peak_mb")}
    return row | {"status": "measured", **figures}


def _add_ratios(rows: Sequence[Row]) -> None:
    """Of CPU time to the whole matrices of the same size, where those were measured."""
    measured = [row for row in rows if row["status"] == "measured"]
    base = next((r["cpu_seconds"] for r in measured if r["variant"] == VARIANTS[0].name), None)
    for row in measured:
        row["ratio"] = None if base is None else row["cpu_seconds"] / base


WORKLOAD = Workload("the loss alone", run, ("pairs", "peak_mb"))
