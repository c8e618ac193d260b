"""What a run says at its start and its end, as it stands on the screen."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from vembed_ds.training.banner import PartFacts, StartFacts, banner
from vembed_ds.training.log_window import LogWindow
from vembed_ds.training.summary import EndFacts, RunRecord, duration, summary

START = StartFacts(
    version="0.1.0",
    output_dir="output/my",
    run_name="cats",
    resumed=None,
    step=0,
    num_steps=702,
    steps_per_epoch=234,
    models="openai/clip-vit-base-patch32",
    parts=[
        PartFacts("text tower", 63_165_952, 0),
        PartFacts("image tower", 0, 87_456_000),
        PartFacts("projection", 0, 0),
        PartFacts("the rest", 1, 0),
    ],
    width=512,
    precision="bf16",
    zero_stage=3,
    gather="once a step",
    reduction="after every chunk",
    offload="optimizer on the host",
    world_size=8,
    machines=2,
    device="NVIDIA H100",
    batch_size=512,
    chunks="as large as 64 of the longest items; as many graphs kept as fit",
    loss="infonce, temperature 0.05 at first, learned",
    teachers=["big", "ema"],
    data=[("pairs.jsonl", 119_808), ("web (a-{000..127}.tar and 3 more)", None)],
    validation=[("val.jsonl", 1)],
    schedule="learning rate 1e-05, cosine, warm-up 71 steps",
    saving="every 500 steps, at the end; the newest 3 are kept",
    evaluating="at the start, at the end",
    trackers=("tensorboard", "wandb"),
    state_bytes=3_100_000_000,
)
END = EndFacts(
    output_dir="output/my",
    step=702,
    record=RunRecord(
        seconds=4321.0,
        pauses={"evaluation": 130.0, "checkpoint": 31.0},
        waited=12.3,
        steps=702,
        pairs=702 * 4096,
        losses=[8.3171, 0.4213],
        evaluations=[
            (0, {"eval/recall@1": 0.0012, "eval/mrr": 0.0123, "eval/num_queries": 2000.0}),
            (702, {"eval/recall@1": 0.2712, "eval/mrr": 0.4, "eval/num_queries": 2000.0}),
        ],
        peaks={"perf/peak_memory_bytes": 13.2e9, "perf/peak_host_memory_bytes": 0.5e9},
    ),
    best=("recall@1", 0.28, 600),
    checkpoint="checkpoint-step-702",
    val_data="my val.jsonl",
    trackers=("tensorboard",),
)

BANNER = """\
---- vembed_ds 0.1.0 ---------------------------------------------------------
run         cats, in output/my
model       openai/clip-vit-base-patch32, embeddings of 512
              text tower       63.2 M trained
              image tower                          87.5 M frozen
              the rest              1 trained
              together         63.2 M trained      87.5 M frozen
data        pairs.jsonl: 119,808 pairs
            web (a-{000..127}.tar and 3 more): a stream
validation  val.jsonl: 1 pair
loss        infonce, temperature 0.05 at first, learned
teachers    big, ema
batch       4,096 pairs a step: 512 on each of 8 ranks
chunks      as large as 64 of the longest items; as many graphs kept as fit
steps       702, 3 epochs of 234
            learning rate 1e-05, cosine, warm-up 71 steps
DeepSpeed   ZeRO stage 3, bf16, optimizer on the host
            gradients reduced after every chunk, parameters gathered once a step
devices     8 ranks on 2 machines, NVIDIA H100
memory      2.9 GiB a rank for model, gradients and optimizer, without chunks
evaluation  at the start, at the end
checkpoints every 500 steps, at the end; the newest 3 are kept
trackers    metrics.jsonl, metrics.csv, tensorboard, wandb
------------------------------------------------------------------------------"""

SUMMARY = """\
---- done: output/my ---------------------------------------------------------
time        1 h 12 min
            training 1 h 09 min (12 s of it waiting for data), evaluation 2 min 10 s, checkpoint 31 s
steps       702: 2,875,392 pairs, 691.2 pairs/s
loss        8.317 -> 0.4213
evaluation                       step 0      step 702
            eval/recall@1        0.0012        0.2712
            eval/mrr             0.0123        0.4000
best        recall@1 0.2800 at step 600, checkpoint-step-600
memory      at most 12.3 GiB on the device and 477 MiB on the host of a rank
checkpoint  output/my/checkpoint-step-702
next        vembed-ds convert output/my output/my/model
            vembed-ds evaluate --model output/my/model --data 'my val.jsonl'
            tensorboard --logdir output/my/tensorboard
------------------------------------------------------------------------------"""


def test_the_banner_as_it_stands_there() -> None:
    assert banner(START) == BANNER


def test_a_resumed_run_of_one_rank_on_a_stream() -> None:
    facts = replace(
        START,
        run_name=None,
        resumed="output/my/checkpoint-step-1500",
        step=1500,
        num_steps=2000,
        steps_per_epoch=None,
        parts=[PartFacts("text tower", 1_234, 0)],
        zero_stage=0,
        gather="",
        offload="",
        world_size=1,
        machines=1,
        teachers=(),
        validation=(),
        trackers=(),
    )
    lines = banner(facts).splitlines()
    assert lines[1:5] == [
        "run         output/my",
        "resumed     output/my/checkpoint-step-1500, step 1,500 of 2,000",
        "model       openai/clip-vit-base-patch32, embeddings of 512",
        "              text tower       1,234 trained",
    ]
    assert "validation  none: nothing is evaluated" in lines
    assert "batch       512 pairs a step" in lines
    assert "steps       2,000" in lines
    assert "trackers    metrics.jsonl, metrics.csv" in lines
    assert not any(line.startswith(("teachers", "together")) for line in lines)


def test_of_a_run_without_its_model_only_what_is_known_stands_there() -> None:
    unknown: dict[str, Any] = {"parts": (), "width": None, "state_bytes": None}
    facts = replace(START, gather="", reduction="", offload="", **unknown)
    expected = [
        line.replace(", embeddings of 512", "").replace(", optimizer on the host", "")
        for line in BANNER.splitlines()[1:]
        if not re.match(r"memory|   .*(tower|rest|together|gradients)", line)
    ]
    first, *lines = banner(facts, note=", a dry run").splitlines()
    assert first.startswith("---- vembed_ds 0.1.0, a dry run -----")
    assert lines == expected
    assert len(lines) == len(BANNER.splitlines()) - 7


def test_the_summary_as_it_stands_there() -> None:
    assert summary(END) == SUMMARY


def test_a_short_resumed_run_without_anything() -> None:
    record = RunRecord(seconds=3.2, steps=2, pairs=8, losses=[1.5])
    facts = EndFacts("out", 12, record, None, "checkpoint-step-12", None, ())
    assert summary(facts).splitlines()[1:-1] == [
        "time        3.2 s",
        "            training 3.2 s (0.0 s of it waiting for data)",
        "steps       2 of 12, the others before it was resumed: 8 pairs, 2.5 pairs/s",
        "loss        1.5",
        "checkpoint  out/checkpoint-step-12",
        "next        vembed-ds convert out out/model",
    ]


def test_of_many_metrics_the_first_are_shown() -> None:
    metrics = {"eval/a/num_queries": 3.0} | {f"eval/a/m{number}": 0.5 for number in range(9)}
    facts = replace(END, record=replace(END.record, evaluations=[(5, metrics)]))
    lines = summary(facts).splitlines()
    assert sum("eval/a/m" in line for line in lines) == 6
    assert "            ... and 3 more in metrics.csv" in lines


def test_a_record_keeps_first_and_last() -> None:
    record = RunRecord()
    for step in range(1, 4):
        record.note_line({"train/loss": 1.0 / step, "perf/peak_host_memory_bytes": step * 10.0})
        record.note_evaluation(step, {"eval/mrr": step / 10})
        record.note_times(LogWindow(waited=0.5, pauses={"checkpoint": 1.0}))
    record.note_evaluation(4, {})
    assert record.losses == [1.0, 1 / 3]
    assert record.evaluations == [(1, {"eval/mrr": 0.1}), (3, {"eval/mrr": 0.3})]
    assert record.peaks == {"perf/peak_host_memory_bytes": 30.0}
    assert (record.waited, record.pauses) == (1.5, {"checkpoint": 3.0})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *(
            (0.04, "0.0 s"),
            (9.94, "9.9 s"),
            (10.4, "10 s"),
            (59.7, "1 min 00 s"),
            (200, "3 min 20 s"),
        ),
        *(
            (3599.9, "1 h 00 min"),
            (18_120, "5 h 02 min"),
            (86_399, "1 d 0 h"),
            (273_600, "3 d 4 h"),
        ),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
