"""``vembed-ds plan``: what it says, and what it needs for that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from vembed_ds.plan import main

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def run(clip_folder: Path, tmp_path: Path) -> Path:
    """A run of a CLIP without weights, on captions alone."""
    model = tmp_path / "model"
    shutil.copytree(clip_folder, model, ignore=shutil.ignore_patterns("*.safetensors"))
    texts = [{"query": f"text {n}", "positive": f"answer {'very ' * n}"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    values = {
        "model_name": str(model),
        "data_path": str(tmp_path / "pairs.jsonl"),
        "retrieval_mode": "t2t",
        "batch_size": 64,
        "use_gradient_cache": True,
        "gradient_cache_chunk_size": 16,
        "num_workers": 0,
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def plan(run: Path, *arguments: str, gib: float = 80) -> list[str]:
    return ["--config", str(run), "--gpus", "8", "--gpu_memory", str(gib), *arguments]


def read(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_table_and_what_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(run, "precision=bf16")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run} on 1 x 8 cuda of 80 GiB"
    assert (
        "  a rank's step: 64 pairs, 128 x text (the longest of 8 records; 8 do not fill one global batch "
        "of 512 (batch_size x ranks), so that a run would refuse them), embeddings of 12" in lines
    )
    assert any(line.startswith("  ZeRO-3, gather once  ") for line in lines)
    chosen = next(line for line in lines if line.startswith("recommended: "))
    assert "--ds_config=ds_configs/zero0.json use_gradient_cache=true" in chosen
    assert lines[-1] == "  because ZeRO-0 sends least and fits; the whole batch fits at once"


def test_enough_records(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(run, "--json", "batch_size=1")) == 0
    assert read(capsys)["items_from"] == "the longest of 8 records"


def test_what_is_configured_comes_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "ds_configs" / "zero2.json")
    assert main(plan(run, "--json", "--ds_config", file, "batch_size=32")) == 0
    found = read(capsys)
    assert found["configured"]
    first = found["ways"][0]
    assert (first["zero_stage"], first["ranks"], first["chunk_size"]) == (2, 8, 16)
    assert found["items"] == {"text": 64}
    assert sum(first["bytes"].values()) == first["total"]
    assert first["fits"]
    assert found["recommended"]["write"]["--ds_config"] == "ds_configs/zero0.json"


def test_too_little_memory(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(run, gib=2.001)) == 1
    assert "recommended: nothing; nothing fits: the leanest way takes" in capsys.readouterr().out


def test_without_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(run, "--json", "--tokens", "20", "retrieval_mode=t2i", "max_negatives=2")) == 0
    found = read(capsys)
    assert found["items"] == {"text": 64, "image": 192}
    assert found["items_from"] == "texts of 20 tokens, images of 1024 x 1024 pixels"
    assert main(plan(run, "--tokens", "33")) == 2
    assert "--tokens 33: texts are cut to 32 tokens" in capsys.readouterr().err
    assert main(plan(run, "--tokens", "8", "retrieval_mode=x2t")) == 2
    assert "retrieval_mode=x2t: what the records hold is not known" in capsys.readouterr().err


@pytest.mark.parametrize(("batching", "texts"), [("homogeneous", 64 * 4), ("mixed", 64 * 3)])
def test_a_step_of_the_data_set_that_gives_most(
    run: Path, batching: str, texts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two, one has two negatives for each pair."""
    values = yaml.safe_load(run.read_text())
    pairs = [{"query": f"q {n}", "positive": "p", "negatives": ["x", "y"]} for n in range(8)]
    path = run.parent / "hard.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values["datasets"] = [{"data_path": values.pop("data_path")}, {"data_path": str(path)}]
    run.write_text(yaml.safe_dump(values | {"batching": batching}))
    assert main(plan(run, "--json")) == 0
    assert read(capsys)["items"] == {"text": texts}


def test_more_ranks_hold_less_of_the_state_and_longer_texts_take_more(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(*arguments: str, stage: int = 2) -> dict[str, int]:
        assert main(plan(run, "--json", "--device", "cpu", *arguments)) == 0
        ways = read(capsys)["ways"]
        found: dict[str, int] = next(way["bytes"] for way in ways if way["zero_stage"] == stage)
        return found

    few, many = taken("--nodes", "1"), taken("--nodes", "4")
    assert few["optimizer"] == pytest.approx(4 * many["optimizer"], rel=0.001)
    large = ["use_gradient_cache=false", "batch_size=1024"]
    short, long = (taken("--tokens", tokens, *large) for tokens in ("8", "32"))
    assert 0 < 2 * short["activations"] < long["activations"]


def test_what_a_run_would_refuse_is_not_recommended(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(plan(run, "--json", "use_torch_compile=true")) == 0
    found = read(capsys)
    assert {way["zero_stage"] for way in found["ways"]} == {0, 2}
    assert {way["largest_chunk_recomputing"] for way in found["ways"]} == {None}
    file = str(ROOT / "ds_configs" / "zero3.json")
    assert main(plan(run, "--ds_config", file, "use_torch_compile=true")) == 2
    assert "use_torch_compile=true: ZeRO stage 3 gathers" in capsys.readouterr().err
    quantized = ["use_lora=true", "load_in_4bit=true", "precision=bf16"]
    assert main(plan(run, "--ds_config", file, *quantized)) == 2
    assert "load_in_4bit=true: ZeRO stage 3" in capsys.readouterr().err


def test_what_is_recommended_is_one_of_our_files_whatever_is_configured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    values["optimizer"] = {"type": "SGD", "params": {"lr": "auto"}}
    values["zero_optimization"]["reduce_bucket_size"] = 1000
    file = tmp_path / "sgd.json"
    file.write_text(json.dumps(values))
    assert main(plan(run, "--json", "--ds_config", str(file))) == 0
    found = read(capsys)
    assert (found["ways"][0]["moments"], found["ways"][0]["bucket"]) == (0, 1000)
    others = [*found["ways"][1:], found["recommended"]]
    assert {(way["moments"], way["bucket"]) for way in others} == {(2, 50_000_000)}


def test_chunks_that_the_run_would_choose(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    automatic = ["gradient_cache_chunk_size=auto", "batch_size=4096", "--device", "cpu"]
    sizes = []
    for gib in (80, 0.55):
        file = str(ROOT / "ds_configs" / "zero0.json")
        main(plan(run, "--json", "--ds_config", file, "--tokens", "32", *automatic, gib=gib))
        found = read(capsys)["ways"][0]
        assert found["chunk_size"] == found["largest_chunk"]
        sizes.append(found["chunk_size"])
    assert 1 < sizes[1] < sizes[0] == 8192


def test_teachers_are_named_as_not_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ["teacher_model_name=some/teacher", "teacher_mode=cached"]
    assert main(plan(run, "--tokens", "8", *teacher)) == 0
    assert "not counted: " in (text := capsys.readouterr().out)
    assert "what the loss compares with teachers" in text
    assert "of teacher" not in text  # its model is gone before training
    assert main(plan(run, "--tokens", "8", "teacher_model_name=some/teacher")) == 0
    assert "model and passes of teacher" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--gpus", "0"], "argument --gpus: 0: give a whole number from 1 to 1000000"),
        (
            ["--nodes", "1000001"],
            "argument --nodes: 1000001: give a whole number from 1 to 1000000",
        ),
        (["--gpus", "many"], "argument --gpus: many: give a whole number from 1 to 1000000"),
        (["--gpu_memory", "-1"], "argument --gpu_memory: -1: give a number of GiB above 0"),
        (["--gpu_memory", "nan"], "argument --gpu_memory: nan: give a number of GiB above 0"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_flags_that_say_nothing(
    run: Path, changed: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(plan(run, *changed))
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_what_is_wrong_is_said_before_anything_else(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(plan(run, gib=2)) == 2
    assert "--gpu_memory 2: 2 GiB of it are set aside" in capsys.readouterr().err
    assert main(plan(run, "batch_sise=3")) == 2
    assert "error: batch_sise=3 (--config_override): unknown key" in capsys.readouterr().err
    file = str(ROOT / "ds_configs" / "zero0.json")
    assert main(plan(run, "--ds_config", file, "precision=fp16")) == 2
    assert "precision=fp16 with zero_optimization.stage=0" in capsys.readouterr().err
    assert main(plan(run, "model_name=no/such")) == 2
    assert "no/such" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        ["use_lora=true"],
        ["use_lora=true", "load_in_4bit=true", "precision=bf16"],
        ["gradient_checkpointing=true"],
        ["freeze_text_encoder=true", "projection_dim=8"],
        ["loss_type=sigmoid"],
        ["use_gradient_cache=false"],
        ["loss_bidirectional=true", "learnable_temperature=true", "precision=fp16"],
    ],
)
@pytest.mark.one_in(3)
def test_kinds_of_runs(run: Path, changes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(run, "--json", *changes)) == 0
    found = read(capsys)
    assert all(way["total"] > 0 for way in found["ways"])
    if "load_in_4bit=true" in changes:
        assert {way["zero_stage"] for way in found["ways"]} == {0, 2}


def test_experts_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which of them compute depends on values."""
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": 30522,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    values = yaml.safe_load(run.read_text())
    model = {"config": config, "processor": values["model_name"]}
    run.write_text(yaml.safe_dump(values | {"model_name": model, "pooling_method": "last_token"}))
    assert main(plan(run)) == 2
    said = capsys.readouterr().err
    assert "Qwen3MoeModel: cannot be computed without the items' values" in said


def test_what_was_not_compared_with_memory_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slices = ["gradient_checkpointing=true", "gradient_checkpointing_slice_size=4"]
    assert main(plan(run, *slices)) == 2
    assert (
        "gradient_checkpointing_slice_size=4: what layers in slices hold" in capsys.readouterr().err
    )
    assert main(plan(run, "gradient_cache_chunk_tokens=4096")) == 2
    assert "gradient_cache_chunk_tokens=4096: chunks of so many" in capsys.readouterr().err
    values = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    values["zero_optimization"]["zero_hpz_partition_size"] = 2
    file = tmp_path / "hpz.json"
    file.write_text(json.dumps(values))
    assert main(plan(run, "--ds_config", str(file))) == 2
    assert "zero_optimization.zero_hpz_partition_size=2" in capsys.readouterr().err
