"""The cheapest way that fits, in an order that is written down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vembed_ds.planning.recommend import (
    GIB,
    Outcome,
    Way,
    chunk_sizes,
    largest_chunk,
    recommend,
    settings_of,
)
from vembed_ds.planning.report import settings_to_write
from vembed_ds.planning.states import Setting

BASE = Setting(ranks=8, zero_stage=0, precision="bf16")
LARGEST = 100


def take(way: Way) -> Outcome:
    """A model whose state takes 40 GiB, of which ZeRO cuts 30, and an item 1 GiB, or 0.25."""
    setting = way.setting
    state = 40 if setting.zero_stage == 0 else 20 if setting.zero_stage == 2 else 12
    state -= 5 if setting.reduction == "per_chunk" else 0
    state -= 4 if setting.offload_optimizer else 0
    items = way.chunk_size * (0.25 if way.checkpointing else 1.0)
    sent = {0: 2, 2: 3, 3: 2.5}[setting.zero_stage]
    chunks = -(-LARGEST // way.chunk_size)
    if setting.reduction == "per_chunk" or setting.gather == "per_module":
        sent *= chunks
    return Outcome(memory=int(GIB * (state + items)), sent=int(1e9 * sent))


def advise(gib: float, *, checkpointing: bool = True, base: Setting = BASE, **options: bool):
    return recommend(
        settings_of(base, **options),
        largest=LARGEST,
        memory=int(gib * GIB),
        take=take,
        checkpointing=checkpointing,
    )


@pytest.mark.parametrize(
    ("gib", "stage", "chunk", "checkpointing", "words"),
    [
        (200, 0, 100, False, "ZeRO-0 sends least and fits; the whole batch fits at once"),
        (50, 0, 8, False, "ZeRO-0 sends least and fits; 8 is the largest power of two that fits"),
        (40, 3, 16, False, "ZeRO-0 would send less, but takes 48.0 GiB with chunks of 8"),
        (14, 3, 8, True, "without checkpointing a chunk of 8 takes 20.0 GiB"),
    ],
)
def test_the_cheapest_way_that_fits(
    gib: int, stage: int, chunk: int, checkpointing: bool, words: str
) -> None:
    advice = advise(gib)
    assert advice.way is not None
    assert advice.way.setting.zero_stage == stage
    assert (advice.way.chunk_size, advice.way.checkpointing) == (chunk, checkpointing)
    assert words in advice.reason
    assert take(advice.way).memory <= gib * GIB


def test_rather_less_traffic_than_a_larger_chunk_but_no_tiny_ones() -> None:
    assert advise(49).way == Way(replace(BASE, zero_stage=0), 8, False)
    found = advise(47).way  # ZeRO-0 has room for 7 items only
    assert found is not None
    assert found.setting.zero_stage == 3


def test_where_the_cheapest_fits_too_the_reason_says_so() -> None:
    """Full training sends as much at ZeRO-3, gathered once, as at ZeRO-0."""

    def as_much(way: Way) -> Outcome:
        found = take(way)
        return replace(found, sent=int(2e9)) if way.setting.zero_stage == 3 else found

    advice = recommend(
        settings_of(BASE),
        largest=LARGEST,
        memory=50 * GIB,
        take=as_much,
        checkpointing=False,
    )
    assert advice.way == Way(replace(BASE, zero_stage=3), 32, False)
    assert advice.reason.startswith(
        "ZeRO-3, gather once sends no more than ZeRO-0, and larger chunks fit; 32 is"
    )


def test_what_is_to_be_written_wins_over_what_is_configured() -> None:
    plain = settings_to_write(Way(BASE, 8, False))
    assert plain["gradient_reduction"] == "once"
    assert "zero3_gather" not in plain
    lean = replace(BASE, zero_stage=3, gather="per_module", reduction="per_chunk")
    found = settings_to_write(Way(lean, 8, True))
    assert found["gradient_reduction"] == "per_chunk"
    assert found["activation_checkpointing"] == "huggingface"


def test_the_host_comes_last() -> None:
    found = advise(14).way
    assert found is not None
    assert not found.setting.offload_optimizer
    found = advise(4.5).way
    assert found is not None
    assert found.setting.offload_optimizer


def test_nothing_fits() -> None:
    advice = advise(2)
    assert advice.way is None
    assert advice.reason.startswith(
        "nothing fits: the leanest way takes 3.2 GiB of 2.0; use more GPUs"
    )


def test_what_a_model_does_not_take_is_not_offered() -> None:
    assert {setting.zero_stage for setting in settings_of(BASE, partitions=False)} == {0, 2}
    half = replace(BASE, precision="fp16")
    assert {setting.zero_stage for setting in settings_of(half)} == {2, 3}
    found = advise(15, checkpointing=False).way
    assert found is not None
    assert not found.checkpointing


def test_chunk_sizes() -> None:
    assert [*chunk_sizes(100)] == [100, 64, 32, 16, 8, 4, 2, 1]
    assert [*chunk_sizes(64)] == [64, 32, 16, 8, 4, 2, 1]
    assert [*chunk_sizes(1)] == [1]
    setting = settings_of(BASE)[0]
    assert largest_chunk(setting, False, largest=100, memory=40 * GIB, take=take) is None
