"""The converted folder against `save_pretrained`, its formats, and conversions that do not end well."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from tests.checkpoints import load_consolidated, seal
from tests.distributed import export_cases as cases
from vembed_ds import Encoder, convert
from vembed_ds.checkpointing import export, parts
from vembed_ds.checkpointing.export import export_model
from vembed_ds.checkpointing.files import read_parameters
from vembed_ds.checkpointing.manifest import write_manifest
from vembed_ds.checkpointing.publish import new_folder
from vembed_ds.checkpointing.tensor_files import TensorFile
from vembed_ds.errors import CheckpointError
from vembed_ds.models.disk_layout import DiskLayout
from vembed_ds.models.families import build_from_config
from vembed_ds.models.lora import LoraSpec, add_adapters

Save = Callable[..., Path]
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def checkpoint(backbones: Path, save: Save) -> Path:
    return save(cases.make_model(backbones, "shared"), "shared")


def by_transformers(checkpoint: Path, folder: Path, *, dtype: torch.dtype, **options: Any) -> None:
    """The backbone of a checkpoint as transformers writes it, whole in memory."""
    config = AutoConfig.from_pretrained(checkpoint / "model")
    model = build_from_config(config, dtype=dtype)
    values, entries = load_consolidated(checkpoint), read_parameters(checkpoint)
    state = {entry["name"]: values[name].reshape(entry["shape"]) for name, entry in entries.items()}
    model.load_state_dict(state)
    model.save_pretrained(folder, **options)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["shared", "clip", "resnet", "gpt2"])
def test_the_folder_is_that_of_transformers(
    backbones: Path, save: Save, tmp_path: Path, kind: str, dtype: str
) -> None:
    saved = save(cases.make_model(backbones, kind), kind)
    by_transformers(saved, tmp_path / "theirs", dtype=FORMATS[dtype])
    export_model(saved, tmp_path / "ours", dtype=dtype)
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name
    settings = json.loads((tmp_path / "ours" / "vembed_config.json").read_text())
    assert settings["dtype"] == dtype


def test_several_shards(checkpoint: Path, tmp_path: Path) -> None:
    by_transformers(checkpoint, tmp_path / "theirs", dtype=torch.float32, max_shard_size="3KB")
    export_model(checkpoint, tmp_path / "ours", max_shard_size="3KB")
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert len(names) > 8
    assert "model.safetensors.index.json" in names
    for name in names:
        ours, theirs = (tmp_path / who / name for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    export_model(checkpoint, tmp_path / "whole")
    loaded = AutoModel.from_pretrained(tmp_path / "ours").state_dict()
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
    texts = ["a dog", "rain"]
    rows = [Encoder(tmp_path / who, device="cpu").encode_text(texts) for who in ("ours", "whole")]
    assert (rows[0] == rows[1]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_part_has_the_format(backbones: Path, save: Save, tmp_path: Path, dtype: str) -> None:
    export_model(
        save(cases.make_model(backbones, "composed"), "composed"), tmp_path / "out", dtype=dtype
    )
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) == 4 + 4  # sentence-transformers' copies of the projections' layers
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values()} == {FORMATS[dtype]}, file
    for stream in ("text", "image"):
        config = json.loads((tmp_path / "out" / f"{stream}_encoder" / "config.json").read_text())
        assert config["dtype"] == dtype
    rows = Encoder(tmp_path / "out", device="cpu").encode_text(["a dog"])
    assert rows.shape == (1, 11)


def test_numbers_that_count_keep_their_format(backbones: Path, save: Save, tmp_path: Path) -> None:
    saved = save(cases.make_model(backbones, "resnet"), "resnet")
    export_model(saved, tmp_path / "out", dtype="float16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    counts = [n for n, t in weights.items() if t.dtype != torch.float16]
    assert counts
    assert all(name.endswith("num_batches_tracked") for name in counts)
    assert {weights[name].dtype for name in counts} == {torch.int64}


@pytest.mark.parametrize(("dtype", "value"), [("float16", -65505.0), ("bfloat16", 3.4e38)])
def test_a_value_beyond_the_format(
    backbones: Path, save: Save, tmp_path: Path, dtype: str, value: float
) -> None:
    model = cases.make_model(backbones, "shared")
    with torch.no_grad():
        model.encoder.towers["text"].backbone.encoder.layer[1].output.dense.bias[3] = value
    saved = save(model, "shared")
    with pytest.raises(
        CheckpointError,
        match=rf"encoder.layer.1.output.dense.bias: holds \S+, and {dtype} ends at .*write float32",
    ):
        export_model(saved, tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.glob("*out*"))
    export_model(saved, tmp_path / "out")


def test_the_largest_float16_is_written(backbones: Path, save: Save, tmp_path: Path) -> None:
    model = cases.make_model(backbones, "shared")
    with torch.no_grad():
        model.encoder.towers["text"].backbone.pooler.dense.bias[3] = 65504.0
    export_model(save(model, "shared"), tmp_path / "out", dtype="float16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert float(weights["pooler.dense.bias"][3]) == 65504.0


def test_adapters_that_part_what_is_tied(
    backbones: Path, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight under two names is written once; so it must be one after training."""
    one, two = (f"encoder.layer.{i}.output.dense.weight" for i in range(2))

    class Tied(DiskLayout):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.tied = {two: one}

    monkeypatch.setattr(parts, "DiskLayout", Tied)
    saved = save(cases.make_model(backbones, "shared"), "shared")
    with pytest.raises(CheckpointError, match=f"{one} and {two} are one weight .* and differ"):
        export_model(saved, tmp_path / "out")


@pytest.mark.parametrize("size", ["5", "5 XB", "-1GB", "0GB", "big"])
def test_a_size_that_says_nothing(checkpoint: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(CheckpointError, match=rf"max_shard_size='{size}': expected a number and"):
        export_model(checkpoint, tmp_path / "out", max_shard_size=size)


def test_dry_run(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert convert.main([str(checkpoint), str(out), "--dry_run", "--max_shard_size", "1MB"]) == 0
    said = capsys.readouterr().out
    assert "nothing was written" in said
    assert not list(tmp_path.glob("*out*"))
    assert convert.main([str(checkpoint), str(out), "--max_shard_size", "1MB"]) == 0
    told = {
        name: int(size.replace(",", ""))
        for size, name in re.findall(r"([\d,]+)  (\S+.safe.*)", said)
    }
    found = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert told == found
    assert len(found) == 2
    for path in out.iterdir():
        assert path.name in said or path.name in (
            *("model.safetensors.index.json", "modules.json", "config_sentence_transformers.json"),
            *("sentence_bert_config.json", "1_Pooling", "2_Normalize"),
        )
    assert "and those of sentence-transformers" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.faults
def test_stopped_by_a_signal(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    def stop_in_the_middle(file: TensorFile, name: str, tensor: torch.Tensor) -> None:
        assert list(tmp_path.glob(".out.partial-*/model.safetensors"))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(TensorFile, "write", stop_in_the_middle)
    before = signal.getsignal(number)
    assert convert.main([str(checkpoint), str(tmp_path / "out")]) == 128 + number
    assert f"error: stopped by {number.name}; {tmp_path / 'out'} was not" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
    assert signal.getsignal(number) is before


@pytest.mark.faults
def test_what_a_killed_conversion_left_goes(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys, os, signal, pathlib\n"
        "from vembed_ds.checkpointing.publish import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", code, str(out)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".out.partial-*")
    prefix = left.name.rpartition("-")[0]
    others = [tmp_path / f"{prefix}-1", tmp_path / ".out.partial-elsewhere-99999999"]
    others.append(tmp_path / f"{prefix}-77.txt")
    for other in others:  # of a living process, of another machine, of somebody else
        other.mkdir()
    export_model(checkpoint, out)
    assert set(tmp_path.glob(".out.*")) == set(others)


@pytest.mark.faults
def test_a_disk_that_is_full_before(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"out: 2,\d+,\d+ bytes are to be .* 1,000 are free"):
        export_model(checkpoint, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


@pytest.mark.faults
def test_a_disk_that_fills_up(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(file: TensorFile, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFile, "write", fill)
    with pytest.raises(
        CheckpointError, match=r"out: no space left on device: .* nothing of out was left"
    ):
        export_model(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.faults
def test_a_disk_that_is_really_full(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other programs fill it while the conversion runs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        monkeypatch.setattr(export, "refuse_without_space", lambda out, size: None)
        with pytest.raises(
            CheckpointError, match=r"no space left on device: .* nothing of out was left there"
        ):
            export_model(checkpoint, disk / "out")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "model/config.json"])
def test_a_flipped_byte_is_found(checkpoint: Path, tmp_path: Path, name: str) -> None:
    seal(checkpoint, step=1, world_size=1, zero_stage=0)
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: its checksum is .*; take another check"):
        export_model(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_checkpoint_without_a_manifest_is_told(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_model(checkpoint, tmp_path / "old")
    assert "has no manifest.json" in caplog.text
    caplog.clear()
    seal(checkpoint, step=1, world_size=1, zero_stage=0)
    export_model(checkpoint, tmp_path / "new")
    assert "manifest" not in caplog.text


def test_one_machines_manifest_of_several_is_told(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = seal(checkpoint, step=1, world_size=2, zero_stage=0)
    files = {name: record for name, record in manifest.files.items() if name.startswith("model/")}
    write_manifest(checkpoint, dataclasses.replace(manifest, files=files, num_disks=2))
    export_model(checkpoint, tmp_path / "new")
    assert (
        f"manifest.json: lists the files of one of 2 machines (node_local_output), so {len(files)} "
        f"of {len(manifest.files)} files are compared with what was written; not compared: "
        f"{', '.join(sorted(manifest.files.keys() - files.keys()))}"
    ) in caplog.text


@pytest.mark.faults
def test_two_at_once(tmp_path: Path) -> None:
    """The one that ends later is refused; nothing is mixed."""

    def write_beside_another() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "mine").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("theirs")

    with pytest.raises(
        CheckpointError,
        match=r"out: exists and is not an empty folder; give a new one, or remove it",
    ):
        write_beside_another()
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "theirs"}


def test_adapter_in_16_bit(backbones: Path, save: Save, tmp_path: Path) -> None:
    model = cases.make_model(backbones, "shared")
    add_adapters(model.trained_backbones(), LoraSpec(r=2, alpha=4.0))
    export_model(save(model, "shared"), tmp_path / "out", adapter=True, dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
