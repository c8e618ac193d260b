"""Time and memory of one step against plain PyTorch, same weights and data, one process.

``python -m benchmarks.step [--rounds 3]``: every variant runs in a process of its own, in turn,
so that peak memory is its own; what is compared is CPU time (user + system) and the peak of
resident memory above that before the first step. Loss and gradient norm of the first step are
the gate: a variant that differs from plain PyTorch gets no figures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

from benchmarks.measuring import memory, reset_peak, run_ranks

PAIRS, LENGTH, CHUNK, STEPS = 256, 16, 32, 4
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VARIANTS = ["plain", *(f"zero{s}-{kind}" for s in range(4) for kind in ("standard", "cached"))]
Step = Callable[[], tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name in VARIANTS:
            found[name] += run_ranks(measure, name, ranks=1)
    print(table(found))


def measure(variant: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**MODEL), add_pooling_layer=False)
    ids = torch.randint(2, MODEL["vocab_size"], (2 * PAIRS, LENGTH))
    step = plain_step(model, ids) if variant == "plain" else engine_step(model, ids, variant)
    before = reset_peak()
    loss, norm = step()
    seconds = []
    for _ in range(STEPS - 1):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    return {
        "loss": loss,
        "grad_norm": norm,
        "cpu_seconds": statistics.median(seconds),
        "peak_mb": (memory("VmHWM") - before) / 1024,
    }


def plain_step(model: BertModel, ids: Tensor) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> tuple[float, float]:
        rows = functional.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)
        loss = functional.cross_entropy(rows[:PAIRS] @ rows[PAIRS:].T / 0.05, torch.arange(PAIRS))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        return float(loss.detach()), float(norm)

    return step


def engine_step(model: BertModel, ids: Tensor, variant: str) -> Step:
    from vembed_ds.data.batches import lay_out
    from vembed_ds.data.chunking import ChunkBudget
    from vembed_ds.data.collators import Batch
    from vembed_ds.data.processors import EncodedItem
    from vembed_ds.engine.ds_config import load_ds_config, resolve_ds_config
    from vembed_ds.engine.initialize import initialize_engine
    from vembed_ds.losses import build_loss
    from vembed_ds.models.embedding_model import EmbeddingModel
    from vembed_ds.models.encoder import TowerEncoder, TowersEncoder
    from vembed_ds.steps.gradient_cache import compute_gradient
    from vembed_ds.training.loss_inputs import loss_inputs

    stage, kind = variant.split("-")
    tower = TowerEncoder(model, pooling="mean", projection=None)
    wrapped = EmbeddingModel(TowersEncoder({"text": tower}))
    config = resolve_ds_config(
        load_ds_config(Path("ds_configs") / f"{stage}.json"),
        origin=stage,
        origins={},
        world_size=1,
        batch_size=PAIRS,
        precision="fp32",
        max_grad_norm=0.0,
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        device_type="cpu",
        fp16_supported=False,
        bf16_supported=True,
    )
    groups = [{"params": list(wrapped.parameters())}]
    engine = initialize_engine(wrapped, ds_config=config, param_groups=groups)
    loss_function = build_loss("infonce", temperature=0.05, loss_bidirectional=False)
    items = [EncodedItem("text", {"input_ids": row.numpy()}) for row in ids]
    roles = {"query": items[:PAIRS], "positive": items[PAIRS:]}
    batch = Batch(indices=[], roles=roles)
    plan = lay_out(roles, budget=ChunkBudget(CHUNK if kind == "cached" else None)).alone()

    def step() -> tuple[float, float]:
        result = compute_gradient(
            engine,
            plan,
            loss_function=lambda rows, learned: loss_function(loss_inputs(batch, rows, learned)),
            pad=lambda stream, chunk: {
                "input_ids": torch.stack([torch.from_numpy(i.inputs["input_ids"]) for i in chunk])
            },
            trainable=wrapped.trainable,
        )
        norm = engine.step()
        assert norm is not None
        return float(result.loss), float(norm)

    return step


def table(found: dict[str, list[dict[str, float]]]) -> str:
    plain = {key: statistics.median(r[key] for r in found["plain"]) for key in found["plain"][0]}
    lines = [
        "| variant | CPU time | peak memory | loss, gradient norm |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, rounds in found.items():
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        gate = f"{middle['loss']:.5f}, {middle['grad_norm']:.5f}"
        if any(abs(middle[k] / plain[k] - 1) > 1e-4 for k in ("loss", "grad_norm")):
            lines.append(f"| {name} | - | - | {gate} WRONG |")
            continue
        ratio = middle["cpu_seconds"] / plain["cpu_seconds"]
        lines.append(f"| {name} | {ratio:.2f}x | {middle['peak_mb']:.0f} MB | {gate} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
