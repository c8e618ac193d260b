"""A notebook in a real kernel: cells that train twice, and the stop button."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.conftest import make_config, pairs  # noqa: F401 (fixtures)

nbformat = pytest.importorskip("nbformat", reason="the extra dev has nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="the extra dev has nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="the extra dev has nbclient and ipykernel")

SECONDS = 200
CELLS = [
    "import os; print('pid', os.getpid())",
    "from vembed_ds import TrainConfig, Trainer\n"
    "trainer = Trainer({config!r})\n"
    "first = trainer.train()",
    "assert trainer.train() == first and len(first) > 1",
    "long = Trainer(TrainConfig.from_yaml({config!r}, output_dir={long!r}, max_steps=100_000))\n"
    "try:\n"
    "    long.train()\n"
    "except Exception as error:\n"
    "    print(type(error).__name__, error)",
    "print('rows', trainer.encoder().encode_queries('a').shape)",
]

pytestmark = pytest.mark.slow


def stop_when_it_trains(kernel: Callable[[], int | None], folder: Path) -> None:
    """What the stop button sends, once a step is logged."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        metrics = folder / "metrics.jsonl"
        trains = metrics.exists() and "train/loss" in metrics.read_text()
        if trains and (pid := kernel()) is not None:
            os.kill(pid, signal.SIGINT)
            return
        time.sleep(0.05)


@pytest.mark.filterwarnings("default")  # the kernel's libraries have some of their own
def test_cells_train_twice_and_stop(make_config: Callable[..., str], tmp_path: Path) -> None:  # noqa: F811
    config, long = make_config(num_workers=1), tmp_path / "long"
    cells = [
        nbformat.v4.new_code_cell(cell.format(config=config, long=str(long))) for cell in CELLS
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)

    def pid() -> int | None:
        outputs = cells[0].outputs
        return int(outputs[0].text.split()[1]) if outputs else None

    threading.Thread(target=stop_when_it_trains, args=(pid, long), daemon=True).start()
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    said = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
    assert "StoppedError stopped by SIGINT on rank 0 at step" in said[3]
    assert 'to go on, call train(resume="auto")' in said[3]
    assert "rows (1, 12)" in said[4]
    assert list(long.glob("checkpoint-step-*"))
