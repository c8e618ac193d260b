"""What commands on ranks share."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator

import pytest

from vembed_ds import command
from vembed_ds.command import Prepared, run_on_ranks


def test_a_rank_without_a_device_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert command._missing_device("cuda", 3) is None
    assert command._missing_device("cpu", 1) is None
    said = str(command._missing_device("cuda", 2))
    assert said.startswith("LOCAL_RANK=2 on ")
    assert "the rank sees 2 cuda devices and needs number 2; start at most 2 ranks on this" in said
    assert "--gpus-per-node instead of --gpus-per-task" in said


def test_a_launcher_that_does_not_say_enough_ends_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(command, "_quiet", lambda: None)  # it changes the whole process
    assert run_on_ranks(lambda: Prepared(1, lambda: None)) == 2
    said = capsys.readouterr().err
    assert "DistributedError: OMPI_COMM_WORLD_RANK is not set, though mpirun started" in said


@pytest.fixture
def deepspeed_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """DeepSpeed's logger, with its filters; the environment is put back."""
    for name in ("TRANSFORMERS_VERBOSITY", "DEEPSPEED_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "error")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    logger = logging.getLogger("DeepSpeed")
    before = list(logger.filters)
    yield logger
    logger.filters[:] = before


def test_deepspeed_warns_of_anything_but_a_missing_accelerator(
    deepspeed_logger: logging.Logger,
) -> None:
    command.quiet_libraries()
    said = {
        text: bool(
            deepspeed_logger.filter(logging.LogRecord("", logging.WARNING, "", 0, text, (), None))
        )
        for text in (
            "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable",
            "the loss scale is very small",
        )
    }
    assert list(said.values()) == [False, True]


@pytest.mark.parametrize(
    ("rank", "terminal", "bars"), [("0", True, True), ("1", True, False), ("0", False, False)]
)
def test_only_rank_0_tells_of_the_hub_and_on_a_terminal_shows_bars(
    rank: str,
    terminal: bool,
    bars: bool,
    deepspeed_logger: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", rank)
    hub = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(hub, "propagate", True)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    command._quiet()
    assert ("HF_HUB_DISABLE_PROGRESS_BARS" in os.environ) is not bars
    assert os.environ.get("HF_HUB_VERBOSITY") == (None if rank == "0" else "error")
    assert not hub.propagate, "every line of it would be there twice"
