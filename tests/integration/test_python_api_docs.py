"""The blocks of docs/python_api.md, one after another in one process, as they are written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.integration.launching import ROOT, run_command
from tests.integration.test_readme_commands import adapted
from tests.tiny import CLIP_WIDTH, caption, save_picture

SECONDS = 240
# All that differs from what a reader types: where the model is, and sizes for a CPU.
CHANGES = {
    "openai/clip-vit-base-patch32": "{model}",
    'data_path="pairs.jsonl", batch_size=64)': (
        'data_path="pairs.jsonl", batch_size=8, epochs=1, image_root="."); '
        'config.to_yaml("my.yaml")'
    ),
    "metrics = Trainer(config).train()": (
        'trainer = Trainer(config); metrics = trainer.train(); trainer.export("output/model")'
    ),
    "epochs=3, batch_size=64": "epochs=3, batch_size=8",
}
CHECKS = """
import json, sys
assert metrics == {{}}
assert scores.shape == (2, 2) and exit_code == 0 and embedding.shape == (1, {width})
assert abs(scores[0, 0] - queries[0] @ documents[0]) < 1e-6
assert config["batch_size"] == 2 and losses[-1][0] == 24 and losses[-1][1] > 0
assert TrainConfig.from_yaml("resolved.yaml")["lr"] == 2e-5
"""

pytestmark = pytest.mark.slow


def blocks() -> list[str]:
    text = (ROOT / "docs" / "python_api.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_every_block_runs(tmp_path: Path, clip_folder: Path) -> None:
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for index in range(1, 17):
        picture = f"images/{index:04}.jpg"
        save_picture(tmp_path / picture, index=index, generator=generator)
        lines.append(f'{{"query": "{caption(index)}", "positive": "{picture}"}}\n')
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    found = blocks()
    assert len(found) == 8, "a block was added: is it run here?"
    script = adapted("\n".join(found), CHANGES, model=clip_folder)
    (tmp_path / "script.py").write_text(script + CHECKS.format(width=CLIP_WIDTH))
    done = run_command([sys.executable, "script.py"], seconds=SECONDS, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(1, 12)" in done.stdout
    for folder in ("output/clip", "output/old/checkpoint-epoch-3"):
        assert (tmp_path / folder / "model.safetensors").is_file()
