"""Offline, one thread, private extensions folder; worlds shared by the whole session."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    DS_ACCELERATOR="cpu",
    WANDB_MODE="offline",
    TRANSFORMERS_VERBOSITY="error",
    PYTHONPATH=os.pathsep.join(
        [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
)
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR", str(Path(__file__).parent.parent / ".cache" / "torch_extensions")
)

import pytest
import torch

from tests.faults.matrix import MATRIX
from tests.thinning import one_in_n
from tests.worlds import World

torch.set_num_threads(1)
# Background jobs of a shell ignore it, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run what is marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the fault matrix; leave out what is slow, or has too many cases, unless asked for it."""
    matrix = {test for tests in MATRIX.values() for test in tests}
    for item in items:
        if item.nodeid.partition("[")[0] in matrix:
            item.add_marker("faults")
    if config.getoption("--all"):
        return
    kept = one_in_n(item for item in items if not item.get_closest_marker("slow"))
    left_out = set(items).difference(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = kept


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """``world(n)``: a running world of n ranks, started once, replaced when a case broke it."""
    worlds: dict[int, World] = {}

    def get(size: int) -> World:
        if size not in worlds or not worlds[size].alive:
            worlds[size] = World(size)
        return worlds[size]

    yield get
    for running in worlds.values():
        running.close()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP of :mod:`tests.tiny`, for every test that trains a model from a folder."""
    from tests.tiny import save_clip  # here: most tests can do without the seconds of transformers

    return save_clip(tmp_path_factory.mktemp("clip"))
