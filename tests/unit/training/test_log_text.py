"""The line that people read while a run goes on."""

from __future__ import annotations

import math

from vembed_ds.training.log_text import log_text

LINE = {
    "train/loss": 4.798612,
    "train/loss_dim_64": 3.0,
    "train/lr": 0.00076,
    "train/grad_norm": math.nan,
    "train/samples_per_second": 54.1183,
    "train/data_wait_seconds": 0.21474,
    "train/skipped_steps": 0.0,
    "embeddings/query_mean_cosine": 0.3,
    "perf/step_seconds": 2.0,
    "train/epoch": 0.465,
}


def test_what_is_looked_at_is_told_with_what_is_left() -> None:
    assert log_text(LINE, step=20, num_steps=1600) == (
        "step 20 of 1,600: loss 4.7986, lr 0.00076, grad_norm nan, epoch 0.465, 54.1 pairs/s, "
        "52 min 40 s left"
    )


def test_skipped_steps_are_told_where_there_are_any() -> None:
    assert "skipped_steps 3" in log_text({**LINE, "train/skipped_steps": 3.0}, step=1, num_steps=9)


def test_at_the_end_nothing_is_left_and_the_first_step_says_nothing_of_the_others() -> None:
    assert log_text(LINE, step=9, num_steps=9).endswith("54.1 pairs/s")
    assert log_text(LINE, step=1, num_steps=9).endswith("54.1 pairs/s")
    assert log_text(LINE, step=2, num_steps=9).endswith("54.1 pairs/s, 14 s left")


def test_evaluations_keep_their_whole_names() -> None:
    found = {"eval/photos/recall@1": 0.001619, "eval/photos/num_queries": 1852.0}
    assert log_text(found, step=0, num_steps=9) == (
        "step 0 of 9: eval/photos/recall@1 0.001619, eval/photos/num_queries 1,852"
    )
