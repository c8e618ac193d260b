"""What is suggested when memory runs out, and how that is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.distributed import phases
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.errors import DistributedError
from vembed_ds.steps.shortage import memory_cause
from vembed_ds.training.memory_report import Setting, report, suggestions

SETTING = Setting(
    batch_size=64,
    budget=ChunkBudget(16),
    kept_graphs=1,
    loss_in_one_piece=False,
    eval_batch_size=16,
    gradient_checkpointing=False,
    zero_stage=1,
    offload=False,
    world_size=8,
    on_device=True,
    num_workers=4,
    prefetch_factor=2,
)
CHUNKS = "gradient_cache_chunk_size: 8, half of now (slower, the update stays the same)"
TOKENS = (
    "gradient_cache_chunk_size: 8 and gradient_cache_chunk_tokens: 150, half of now (slower, the "
    "update stays the same)"
)
CACHE = (
    "use_gradient_cache: true, with gradient_cache_chunk_size: 32, half of batch_size (the update "
    "stays the same)"
)
GRAPHS = "gradient_cache_kept_graphs: 1, not 3 (slower, the update stays the same)"
CHECKPOINTING = "gradient_checkpointing: true (slower)"
ZERO = "a higher ZeRO stage than 1 (--ds_config ds_configs/zero2.json)"
ZERO3 = "a higher ZeRO stage than 2 (--ds_config ds_configs/zero3.json)"
OFFLOAD = "the optimizer on the host (--ds_config ds_configs/zero2_offload.json)"
BATCH = "batch_size below 64 (fewer negatives: another training)"
LESS = "a smaller model, precision: bf16, or use_lora: true"


@pytest.mark.parametrize(
    ("kinds", "changed", "expected"),
    [
        ([Kind.REPLAY], {}, [CHUNKS, CHECKPOINTING, ZERO, OFFLOAD, BATCH]),
        (
            [Kind.EMBEDDING],
            {"budget": ChunkBudget(None)},
            [CACHE, CHECKPOINTING, ZERO, OFFLOAD, BATCH],
        ),
        (
            [Kind.REPLAY],
            {"gradient_checkpointing": True, "offload": True, "zero_stage": 2},
            [CHUNKS, ZERO3, BATCH],
        ),
        (
            [Kind.REPLAY],
            {"budget": ChunkBudget(1), "zero_stage": 3, "offload": True},
            [CHECKPOINTING, BATCH],
        ),
        (
            [Kind.REPLAY],
            {"budget": ChunkBudget(16, tokens=300)},
            [TOKENS, CHECKPOINTING, ZERO, OFFLOAD, BATCH],
        ),
        ([Kind.LOSS], {"world_size": 1}, [BATCH, CHUNKS, OFFLOAD]),
        ([Kind.LOSS], {"kept_graphs": 3, "world_size": 1}, [GRAPHS, BATCH, CHUNKS, OFFLOAD]),
        (
            [Kind.LOSS],
            {"loss_in_one_piece": True, "world_size": 1},
            [
                "loss_tile_size: auto, not null (the update stays the same)",
                BATCH,
                CHUNKS,
                OFFLOAD,
            ],
        ),
        (
            [Kind.REPLAY],
            {"kept_graphs": 3, "zero_stage": 3},
            [
                GRAPHS,
                CHUNKS,
                CHECKPOINTING,
                "the optimizer on the host (--ds_config ds_configs/zero3_offload.json)",
                BATCH,
            ],
        ),
        ([Kind.OPTIMIZER], {}, [ZERO, OFFLOAD, LESS]),
        ([Kind.BUILDING], {"zero_stage": 3, "offload": True}, [LESS]),
        ([Kind.EVALUATION, Kind.EMBEDDING], {}, ["eval_batch_size below 16", ZERO]),
        (
            [Kind.REPLAY],
            {
                "budget": ChunkBudget(1),
                "batch_size": 1,
                "gradient_checkpointing": True,
                "zero_stage": 3,
                "offload": True,
            },
            [LESS],
        ),
        ([Kind.DATA], {}, ["num_workers below 4, or prefetch_factor below 2", BATCH]),
    ],
)
def test_only_what_applies_is_suggested_in_a_fixed_order(
    kinds: list[Kind], changed: dict[str, object], expected: list[str]
) -> None:
    setting = SETTING._replace(**changed)  # type: ignore[arg-type]
    assert suggestions(kinds, setting, on_host=False) == expected


def test_the_host_s_memory_is_another_s_than_the_accelerator_s() -> None:
    found = suggestions([Kind.REPLAY], SETTING._replace(offload=True), on_host=True)
    assert found[0].startswith("num_workers below 4")
    assert found[1] == "DeepSpeed's JSON file without offload"
    assert found[2].startswith("fewer ranks on this machine")
    on_cpu = SETTING._replace(on_device=False)
    assert suggestions([Kind.REPLAY], on_cpu, on_host=True) == [CHUNKS, CHECKPOINTING, ZERO, BATCH]
    assert suggestions([Kind.LOADING], on_cpu, on_host=True)[0].startswith("fewer ranks")


def test_a_teacher_s_memory_is_not_the_student_s() -> None:
    found = suggestions([Kind.TEACHER, Kind.EMBEDDING], SETTING, on_host=False)
    assert found[0] == CHUNKS
    assert found[1].startswith("teacher_mode: cached")


def raised(action: Callable[[], object]) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught, phase(Kind.REPLAY, "replaying"):
        action()
    return caught.value


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.25 GiB is free. Process 1 has 77 GiB memory in use."
)


def fail_as_cuda_does() -> None:
    raise torch.OutOfMemoryError(CUDA)


@pytest.mark.parametrize(
    ("action", "figures"),
    [
        (lambda: torch.empty(2**50), "(4194304.00 GiB asked, "),
        (lambda: np.empty(2**50), "(8.00 PiB asked, "),
        (lambda: bytearray(2**55), "("),
    ],
)
def test_what_really_runs_out_is_known(action: Callable[[], object], figures: str) -> None:
    error = raised(action)
    assert memory_cause(error) is error
    message = str(report(error, SETTING._replace(on_device=False)))
    place = phases.current().place
    assert message.startswith(f"{place}: replaying: no memory on the host {figures}")
    assert (
        f"GiB free now); what helps, in this order: (1) {CHUNKS}; (2) {CHECKPOINTING}; (3) "
        in message
    )


def test_an_accelerator_s_figures_are_read_from_its_message() -> None:
    message = str(report(raised(fail_as_cuda_does), SETTING))
    assert "(2.00 GiB asked, 1.25 GiB of 79.10 GiB free); what helps" in message
    assert message.endswith("[OutOfMemoryError: " + " ".join(CUDA.split())[:150] + "]")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        DistributedError("rank 1 failed: out of memory"),
    ],
)
def test_other_errors_pass(error: Exception) -> None:
    assert memory_cause(error) is None


def test_the_cause_of_an_error_counts() -> None:
    def again() -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise RuntimeError("backward failed") from error

    assert isinstance(memory_cause(raised(again)), MemoryError)
