"""The blocks under "Your own data" of the README, run as they are written."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPModel

from tests.integration.launching import ROOT, free_port, run_command
from tests.tiny import CLIP_WIDTH, caption, save_picture

COMMAND_SECONDS = 180  # a training takes 20 on an idle machine, 70 on a busy one; a hang ends here
NUM_PAIRS, NUM_VAL = 16, 12  # Recall@10 needs more than ten pictures

# All that differs from what a reader types, and nothing else: where the model and the pictures
# are, sizes that a CPU trains in seconds, and a checkpoint to resume in the middle of the run.
IN_THE_YAML = {
    "model_name: openai/clip-vit-base-patch32 ": "model_name: {model} ",
    "image_root: /data\n": "image_root: {folder}/data\n",
    "batch_size: 512 ": "batch_size: 8 ",
    "gradient_cache_chunk_size: 64 ": "gradient_cache_chunk_size: 3 ",
    "save_steps: 500 ": "save_steps: 1 ",
}
IN_THE_COMMANDS = {
    "--num_gpus 8 ": "--num_gpus 2 --master_port {port} ",
    " batch_size=1024 ": " batch_size=4 max_steps=2 ",
}
IN_THE_PYTHON = {'"/data/images/': '"{folder}/data/images/'}

pytestmark = [pytest.mark.slow, pytest.mark.distributed(2)]


def your_own_data() -> dict[str, str]:
    """The fenced blocks of the section by their language; of the shell's the first, without a launch."""
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## Your own data\n(.*?)^## ", readme, re.DOTALL | re.MULTILINE)
    assert section is not None, "the README has no section 'Your own data'"
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
    languages = [language for language, _ in blocks]
    assert languages == ["json", "yaml", "bash", "bash", "python"], languages
    return dict(reversed(blocks))


def adapted(text: str, changes: Mapping[str, str], **values: Any) -> str:
    """``text`` with every change made; one that no longer applies is an error."""
    for written, tested in changes.items():
        assert written in text, f"the README no longer says {written!r}"
        text = text.replace(written, tested.format(**values))
    return text


def write_pairs(folder: Path, record: dict[str, str]) -> None:
    """``pairs.jsonl`` and ``val.jsonl``: the README's own record, then others of its form."""
    assert list(record) == ["query", "positive"]
    first = Path(record["positive"])
    (folder / "data" / first.parent).mkdir(parents=True)
    generator = np.random.default_rng(0)
    lines = []
    for index in range(NUM_PAIRS):
        number = f"{int(first.stem) + index:0{len(first.stem)}}"
        pair = {"query": caption(index), "positive": str(first.with_stem(number))}
        save_picture(folder / "data" / pair["positive"], index=index, generator=generator)
        lines.append(json.dumps(pair if index else record) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    (folder / "val.jsonl").write_text("".join(lines[:NUM_VAL]))


def prepare(folder: Path, blocks: Mapping[str, str], *, model: Path) -> None:
    """What a reader has: the repository's folder, the data, a model, and ``my.yaml``."""
    (folder / "ds_configs").symlink_to(ROOT / "ds_configs")
    write_pairs(folder, json.loads(blocks["json"]))
    name = blocks["yaml"].splitlines()[0].removeprefix("# ")
    (folder / name).write_text(adapted(blocks["yaml"], IN_THE_YAML, folder=folder, model=model))


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One line of the README in a shell, in ``folder``; it must succeed."""
    done = run_command(["bash", "-c", line], seconds=COMMAND_SECONDS, folder=folder)
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done


def last_metrics(folder: Path) -> dict[str, Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if "train/loss" in line][-1]
    return {key: last[key] for key in ("step", "train/loss", "train/grad_norm")}


def test_your_own_data_as_the_readme_says(
    tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = your_own_data()
    prepare(tmp_path, blocks, model=clip_folder)
    lines = adapted(blocks["bash"], IN_THE_COMMANDS, port=free_port()).replace("\\\n", " ")
    validate, plan, train, resume, zero3, convert, evaluate = lines.splitlines()
    mine, other = tmp_path / "output" / "my", tmp_path / "output" / "other"

    found = run(validate, tmp_path).stdout
    assert (
        f"data_path=pairs.jsonl: {NUM_PAIRS} of {NUM_PAIRS} records read, all can be used" in found
    )
    assert f"pairs also trained on: {NUM_VAL}" in found
    assert "recommended: --ds_config=ds_configs/zero0.json" in run(plan, tmp_path).stdout

    run(train, tmp_path)
    assert (mine / "latest").read_text() == "checkpoint-step-3"
    assert (mine / "checkpoint-step-3").is_dir()
    assert (mine / "config.yaml").is_file()
    assert json.loads((mine / "ds_config.json").read_text())["bf16"]["enabled"] is True
    assert list((mine / "tensorboard").glob("events.*"))

    uninterrupted = last_metrics(mine)
    # As a run that was killed in its second step leaves it.
    (mine / "latest").write_text("checkpoint-step-1")
    done = run(resume, tmp_path)
    assert "resuming from output/my/checkpoint-step-1, step 1 of 3" in done.stderr
    assert last_metrics(mine) == uninterrupted
    assert not list(mine.glob("previous-*")), "a resumed run belongs to the same folder"

    run(zero3, tmp_path)
    assert (other / "latest").read_text() == "checkpoint-step-2"
    resolved = json.loads((other / "ds_config.json").read_text())
    assert resolved["zero_optimization"]["stage"] == 3
    assert resolved["optimizer"]["params"]["lr"] == 2e-5
    assert resolved["train_micro_batch_size_per_gpu"] == 4

    run(convert, tmp_path)
    model = CLIPModel.from_pretrained(mine / "model")  # plain Hugging Face, no code of ours
    assert model.config.projection_dim == CLIP_WIDTH

    table = run(evaluate, tmp_path).stdout
    assert re.search(r"Recall@1 .*\d", table), table
    assert re.search(r"Recall@10 .*\d", table), table

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(adapted(blocks["python"], IN_THE_PYTHON, folder=tmp_path), names)
    texts, images, scores = names["texts"], names["images"], names["scores"]
    assert texts.shape == (2, CLIP_WIDTH)
    assert images.shape == (1, CLIP_WIDTH)
    assert scores.shape == (2, 1)
    assert texts.dtype == images.dtype == np.float32
    assert np.linalg.norm([*texts, *images], axis=1) == pytest.approx(1.0, rel=1e-5)
