"""Calls as vembed-factory's scripts make them: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vembed_ds import TrainConfig, Trainer
from vembed_ds.api import factory
from vembed_ds.api.trainer import Metrics
from vembed_ds.errors import ConfigError

PATH = "train.jsonl"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data that the calls name."""
    monkeypatch.chdir(tmp_path)
    for name in (PATH, "val.jsonl"):
        Path(name).write_text("{}")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that ``train`` of a :class:`Trainer` would have trained, and its exports."""
    seen: list[Any] = []

    def train(self: Trainer, resume: Any, allow_change: Any) -> Metrics:
        seen.append(self.config)
        return {"eval/mrr": 0.5}

    def export(self: Trainer, folder: Path) -> Path:
        seen.append(folder)
        return folder

    monkeypatch.setattr(Trainer, "_train", train)
    monkeypatch.setattr(Trainer, "export", export)
    return seen


def test_its_defaults(called: list[Any]) -> None:
    trainer = Trainer("some/model")
    assert trainer.train(PATH) == 0
    config, folder = called
    values = {
        key: config[key]
        for key in ("model_name", "data_path", "val_data_path", "output_dir", *factory.DEFAULTS)
    }
    assert values == {
        "model_name": "some/model",
        "data_path": PATH,
        "val_data_path": None,
        "output_dir": "output",
        "epochs": 3,
        "batch_size": 64,
        "learning_rate": 5e-5,
        "use_gradient_cache": True,
        "retrieval_mode": "t2i",
        "report_to": "none",
    }
    assert config["use_lora"] is False, "its default of True was never read"
    assert folder == Path("output/checkpoint-epoch-3")
    assert trainer.metrics == {"eval/mrr": 0.5}


def test_every_argument_of_its_train(called: list[Any]) -> None:
    given = {
        "val_data_path": "val.jsonl",
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "use_gradient_cache": False,
        "use_mrl": True,
        "mrl_dims": [64, 32],
        "retrieval_mode": "t2t",
        "encoder_mode": "bert",
        "text_model_name": None,
        "image_model_name": None,
        "save_steps": 5,
        "use_lora": True,
        "report_to": "wandb",
        "attn_implementation": "sdpa",
        "torch_dtype": "bfloat16",
        "gradient_checkpointing": True,
        "config_override": "temperature=0.1 seed=3",
    }
    assert ("data_path", *given) == factory.POSITIONAL
    trainer = Trainer(model_name="some/model", mode="auto", output_dir="out", use_gpu=True)
    trainer.train(data_path=PATH, **given)
    Trainer("some/model", "auto", "out").train(PATH, *given.values())
    by_name, folder, by_place, _ = called
    assert by_name == by_place
    assert folder == Path("out/checkpoint-epoch-2")
    meant = {"torch_dtype": ("precision", "bf16")}
    for key, value in given.items():
        if key not in ("config_override", "text_model_name", "image_model_name"):
            name, expected = meant.get(key, (key, value))
            assert by_name[name] == (tuple(expected) if isinstance(expected, list) else expected)
    assert (by_name["temperature"], by_name["seed"]) == (0.1, 3)


def test_calls_of_its_documentation(called: list[Any]) -> None:
    # README: a keyword that its train had not.
    Trainer("openai/clip-vit-base-patch32").train(data_path=PATH, output_dir="mine", epochs=1)
    assert called[0]["output_dir"] == "mine"
    assert called[1] == Path("mine/checkpoint-epoch-1")
    Trainer().train(PATH, lr=1e-3, mrl_dims=[9, 5])
    assert called[2]["model_name"] == factory.MODEL
    assert called[2]["lr"] == 1e-3, "the other spelling of a default"
    assert called[2]["mrl_dims"] != (9, 5), "without use_mrl it was not passed on"
    Trainer("m").train(PATH, config_override=["mrl_dims=[8, 4]"], use_mrl=True)
    assert called[4]["mrl_dims"] == (8, 4)


def test_mistakes_are_the_configurations(called: list[Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"epoch=3 \(Trainer\): unknown key; did you mean epochs?"
    ):
        Trainer("m").train(PATH, epoch=3)
    with pytest.raises(ConfigError, match="dry_run=True"):
        Trainer("m").train(PATH, dry_run=True)
    with pytest.raises(TypeError, match="several values for 'epochs'"):
        Trainer("m").train(PATH, None, 3, epochs=3)
    with pytest.raises(TypeError, match="at most 19 arguments"):
        Trainer("m").train(*[PATH] * 20)
    with pytest.raises(TypeError, match="several values for 'model_name'"):
        Trainer("m", model_name="n")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="mode='fast': expected one of auto, clip"):
        Trainer("m", "fast")
    with pytest.raises(ConfigError, match="call train"):
        _ = Trainer("m").config
    with pytest.raises(ConfigError, match="train_data: give settings by TrainConfig"):
        Trainer(model_name="m", train_data=[{"query": "a"}])  # type: ignore[call-overload]
    assert called == []


def test_a_mode_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    Trainer("m", mode="clip")
    assert "mode='clip': not used; the model's own config says what it is" in caplog.text


def test_use_gpu_false_needs_a_process_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    Trainer("m", use_gpu=False)  # here is none
    monkeypatch.setattr(type(get_accelerator()), "device_name", lambda self, index=None: "cuda")
    with pytest.raises(ConfigError, match="DS_ACCELERATOR=cpu"):
        Trainer("m", use_gpu=False)


def test_it_does_not_write_over_the_model_it_starts_from(called: list[Any], tmp_path: Path) -> None:
    (tmp_path / "checkpoint-epoch-3").mkdir()
    trainer = Trainer(str(tmp_path / "checkpoint-epoch-3"), output_dir=tmp_path)
    with pytest.raises(ConfigError, match="is the folder that the trained model is written into"):
        trainer.train(PATH)
    assert called == []


def test_both_kinds_of_calls_are_not_mixed(tmp_path: Path) -> None:
    config = TrainConfig(model_name="m", data_path=PATH)
    with pytest.raises(ConfigError, match="train: data_path belongs to the TrainConfig"):
        Trainer(config).train(PATH)
    with pytest.raises(ConfigError, match="train: epochs belongs to the TrainConfig"):
        Trainer(config).train(epochs=3)  # type: ignore[call-overload]
    for given in ({"output_dir": "x"}, {"use_gpu": True}, {"model_name": "n"}, {"mode": "clip"}):
        with pytest.raises(ConfigError, match=f"{next(iter(given))}=.* beside a configuration"):
            Trainer(config, **given)  # type: ignore[call-overload]


def test_data_is_given_once(tmp_path: Path) -> None:
    rows = [{"query": "a", "positive": "b"}]
    config = TrainConfig(model_name="m", data_path=PATH)
    with pytest.raises(ConfigError, match="train_data: stands beside data_path="):
        Trainer(config, train_data=rows)
    with pytest.raises(ConfigError, match="no training data: set data_path in TrainConfig, or"):
        Trainer(TrainConfig(model_name="m"))
    with pytest.raises(
        ConfigError, match="best_metric='recall@1': there is nothing to evaluate on"
    ):
        Trainer(TrainConfig(model_name="m", best_metric="recall@1"), train_data=rows)
    Trainer(
        TrainConfig(model_name="m", best_metric="recall@1"), train_data=rows, eval_data="val.jsonl"
    )


def test_a_yaml_file_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name: m\ndata_path: {PATH}\noutput_dir: {tmp_path}/out\n")
    trainer = Trainer(file)
    assert trainer.config == TrainConfig.from_yaml(file)
    assert trainer.output_dir == tmp_path / "out"
