"""vembed-factory's training names in one process: batches, builders, what is refused."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import vembed_ds.training as published
from vembed_ds.errors import CheckpointError, ConfigError, DataError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.training import checkpoint, trainer
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.model_builder import _groups, _schedule
from vembed_ds.training.model_setup import check_family
from vembed_ds.training.saves import Saves
from vembed_ds.training.tensor_batches import TensorItems, itemize

IDS = torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
PIXELS = torch.arange(24.0).reshape(2, 3, 2, 2)
TEXTS = {"input_ids": IDS, "attention_mask": MASK}
POSITIVES = {"pos_input_ids": IDS + 10, "pos_attention_mask": MASK}
STREAMS = ("text", "image", "joint")


def test_every_name_is_there_and_importing_them_costs_nothing() -> None:
    for name in published.__all__:
        assert callable(getattr(published, name)), name
    code = "import sys, vembed_ds.training; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'accelerator'"):
        published.accelerator  # noqa: B018


# Module of vembed-factory's snippets, and what they import from it.
IMPORTS = {
    "training": ["load_and_parse_config", "Trainer"],
    "training.config": ["load_and_parse_config", "get_distributed_config"],
    "training.data_utils": [
        *("unpack_query_batch", "unpack_positive_batch", "concat_batches", "maybe_first"),
    ],
    "training.optimizer_builder": ["build_optimizer", "build_scheduler", "resolve_tracker"],
    "training.model_builder": [
        *("build_model", "build_teacher_model", "apply_lora", "enable_static_graph"),
    ],
    "training.checkpoint": ["save_checkpoint"],
    "training.evaluator": ["Evaluator"],
    "training.trainer": ["Trainer"],
    "training.training_loop": ["Trainer"],
}


@pytest.mark.parametrize("module", IMPORTS)
def test_every_import_of_the_snippets_is_the_published_name(module: str) -> None:
    found = importlib.import_module(f"vembed_ds.{module}")
    for name in IMPORTS[module]:
        assert getattr(found, name) is getattr(published, name)


def test_a_script_changes_settings_as_the_snippets_do(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name: a/b\ndata_path: c/d\nnum_workers: 0\nlearning_rate: 1.0e-4\n")
    config = published.load_and_parse_config(config=path)
    assert published.get_distributed_config(config) == (False, False, False)
    config["use_gradient_cache"] = True
    config["gradient_checkpointing"] = True
    config["ddp_find_unused_parameters"] = True  # as in a file: accepted, means nothing here
    config["learning_rate"] = 3e-4
    assert published.get_distributed_config(config) == (True, True, False)
    assert (config["lr"], config.get("learning_rate"), "learning_rate" in config) == (
        *(3e-4, 3e-4),
        True,
    )
    assert "nothing" not in config
    assert config.get("nothing", 5) == 5
    config["lora_r"] = 0
    with pytest.raises(ConfigError, match=r"lora_r=0 \(config\): expected a whole number > 0"):
        published.get_distributed_config(config)


@pytest.mark.parametrize(
    ("mode", "batch", "query"),
    [
        ("t2i", TEXTS, {"input_ids", "attention_mask"}),
        ("i2t", {**TEXTS, "query_pixel_values": PIXELS}, {"pixel_values"}),
        (
            "m2t",
            {**TEXTS, "query_pixel_values": PIXELS},
            {"input_ids", "attention_mask", "pixel_values"},
        ),
    ],
)
def test_the_query_is_what_the_mode_says(mode: str, batch: Any, query: set[str]) -> None:
    """Beside an image query of CLIP a text is ignored, not embedded in its place (defect 26)."""
    assert published.unpack_query_batch(batch, mode).keys() == query


def test_an_image_query_of_a_vision_language_model_keeps_its_tokens() -> None:
    batch = {
        **TEXTS,
        "query_input_ids": IDS + 1,
        "query_attention_mask": MASK,
        "query_pixel_values": torch.zeros(8, 5),
        "query_image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
    }
    inputs = published.unpack_query_batch(batch, "i2i")
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
    assert torch.equal(inputs["input_ids"], IDS + 1)


def test_positives_and_negatives() -> None:
    batch = {**TEXTS, **POSITIVES, "pixel_values": PIXELS}
    assert torch.equal(published.unpack_positive_batch(batch, "t2t")["input_ids"], IDS + 10)
    assert published.unpack_positive_batch(batch, "t2i").keys() == {"pixel_values"}
    assert published.unpack_negative_batch(batch) is None
    texts = {"neg_input_ids": IDS, "neg_attention_mask": MASK}
    negatives = published.unpack_negative_batch({**batch, **texts})
    assert negatives is not None, "text negatives were dropped by vembed-factory (defect 4)"
    assert torch.equal(negatives["input_ids"], IDS)


def test_what_a_batch_lacks_is_named() -> None:
    with pytest.raises(
        DataError, match="retrieval_mode=i2t: the query needs query_pixel_values, but the batch has"
    ):
        published.unpack_query_batch(TEXTS, "i2t")


def test_joined_batches_are_padded_and_keep_their_sizes() -> None:
    longer = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "attention_mask": torch.ones(1, 5)}
    images = {"pixel_values": PIXELS, "image_grid_thw": torch.tensor([[1, 1, 1], [1, 1, 1]])}
    joined, sizes = published.concat_batches([{**TEXTS, **images}, longer], pad_token_id=9)
    assert sizes == [2, 1]
    assert joined["input_ids"].tolist() == [[5, 6, 7, 0, 9], [5, 6, 0, 0, 9], [1, 2, 3, 4, 5]]
    assert joined["attention_mask"].tolist()[0] == [1, 1, 1, 0, 0]
    assert torch.equal(joined["pixel_values"], PIXELS)
    assert joined["image_grid_thw"].shape == (2, 3)
    with pytest.raises(DataError, match="the same text inputs"):
        published.concat_batches([TEXTS, {"pixel_values": PIXELS}])


def test_maybe_first() -> None:
    rows = torch.ones(2, 3)

    class Output:
        pooler_output = None
        last_hidden_state = torch.arange(12.0).reshape(2, 2, 3)

    assert published.maybe_first(rows) is rows
    assert published.maybe_first((rows, None)) is rows
    assert torch.equal(published.maybe_first(Output()), Output.last_hidden_state[:, 0])
    assert published.maybe_first({"text": rows, "logit_scale": rows[0]}) is rows
    with pytest.raises(TypeError, match="those of several streams"):
        published.maybe_first({"text": rows, "image": rows})


def test_items_come_back_as_the_batch_they_were() -> None:
    tensors = {
        **TEXTS,
        "pos_pixel_values": PIXELS,
        "neg_input_ids": torch.cat([IDS, IDS]),
        "neg_attention_mask": torch.cat([MASK, MASK]),
        "neg_counts": torch.tensor([1, 3]),
        "labels": torch.tensor([7, 7]),
    }
    batch = itemize(tensors, retrieval_mode="t2i", streams=STREAMS)
    assert [item.stream for item in batch.roles["query"]] == ["text", "text"]
    assert [item.stream for item in batch.roles["positive"]] == ["image", "image"]
    assert [len(item.inputs["input_ids"]) for item in batch.roles["query"]] == [3, 2]
    assert batch.negative_counts == [1, 3]
    assert batch.labels == [7, 7]
    assert batch.keys["negative"][0] == batch.keys["query"][0] == batch.keys["negative"][2]
    assert batch.keys["query"][0] != batch.keys["query"][1]
    padded = TensorItems().pad("text", batch.roles["query"])
    assert torch.equal(padded["input_ids"], IDS[:, :3])
    assert torch.equal(padded["attention_mask"], MASK[:, :3])
    images = TensorItems().pad("image", batch.roles["positive"])
    assert torch.equal(images["pixel_values"], PIXELS)
    with pytest.raises(
        DataError, match=r"4 negatives for 2 queries do not fit neg_counts=\[1, 1\]"
    ):
        itemize({**tensors, "neg_counts": [1, 1]}, retrieval_mode="t2i", streams=STREAMS)


def test_flat_images_go_to_the_item_that_they_belong_to() -> None:
    patches = torch.arange(30.0).reshape(10, 3)
    tensors = {
        **TEXTS,
        "pos_input_ids": IDS,
        "pos_attention_mask": MASK,
        "pos_pixel_values": patches,
        "pos_image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 3]]),
    }
    batch = itemize(tensors, retrieval_mode="t2i", streams=("text", "image"))
    first, second = batch.roles["positive"]
    assert (first.stream, len(first.inputs["pixel_values"])) == ("image", 4)
    padded = TensorItems().pad("image", [second, first])
    assert torch.equal(padded["pixel_values"], torch.cat([patches[4:], patches[:4]]))
    assert padded["image_grid_thw"].tolist() == [[1, 2, 3], [1, 2, 2]]


def test_trackers_have_names() -> None:
    assert published.resolve_tracker(report_to=None) == (None, {"report_to": "none"})
    assert published.resolve_tracker(report_to="wandb") == ("wandb", {"report_to": "wandb"})
    assert published.resolve_tracker(report_to="swanlab")[0] == "swanlab"  # defect 46
    with pytest.raises(ConfigError, match="report_to='comet': no tracker 'comet': expected one or"):
        published.resolve_tracker(report_to="comet")


def test_optimizer_and_schedule_from_a_plain_mapping() -> None:
    config = {"model_name": "a/b", "lr": 0.1, "weight_decay": 0.3, "warmup_ratio": 0.2}
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = published.build_optimizer(model, config)
    decay, rest = optimizer.param_groups
    assert [p.dim() for p in decay["params"]] == [2]
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)  # norms too: defect 37
    schedule, warmup = published.build_scheduler(
        optimizer, config, num_epochs=2, steps_per_epoch=25
    )
    assert warmup == 10
    assert schedule.get_last_lr()[0] == 0.0
    assert [group["lr"] for group in _groups(optimizer)] == [0.1, 0.1]
    with pytest.raises(ConfigError, match="warmup_steps=50: the run has 50 steps"):
        published.build_scheduler(
            optimizer, config | {"warmup_steps": 50}, num_epochs=2, steps_per_epoch=25
        )


def test_what_deepspeed_cannot_take_over_is_refused() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(ConfigError, match="optimizer: SGD cannot be handed to DeepSpeed"):
        _groups(optimizer)
    with pytest.raises(ConfigError, match="scheduler: StepLR cannot be made anew"):
        _schedule(StepLR(optimizer, 3))


def test_student_and_teacher(clip_folder: Path) -> None:
    config = {"model_name": str(clip_folder), "retrieval_mode": "t2i"}
    model = published.build_model(config)
    assert isinstance(model, EmbeddingModel)
    assert all(model.trainable(part) for part in ("text", "image"))
    assert not published.build_model(config | {"retrieval_mode": "t2t"}).trainable("image")
    assert published.build_teacher_model(config) is None
    teacher = published.build_teacher_model(config | {"teacher_model_name": str(clip_folder)})
    assert teacher is not None
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.train().children())


def test_adapters_come_before_the_engine(clip_folder: Path) -> None:
    config = {"model_name": str(clip_folder), "use_lora": True, "lora_r": 2}
    model = published.build_model(config)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names == []
    with pytest.raises(ConfigError, match="the engine was made before the adapters"):
        published.apply_lora(model, config, object())
    assert published.apply_lora(model, config) is model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distillation_loss_fn": len}, "distillation_loss_fn: a function of one rank's"),
        ({"teacher_model": nn.Linear(1, 1)}, "teacher_model: Linear is no EmbeddingModel"),
        ({"teacher_model": "TEACHER"}, "the configuration must name one teacher"),
        ({"teacher_ema_decay": 0.9}, "teacher_model=None: the configuration has a teacher, 'ema'"),
        (
            {"teacher_model": "TEACHER", "teacher_ema_decay": 0.9},
            "the configuration must name one teacher",
        ),
        (
            {"teacher_model": "TEACHER", "teacher_model_name": "a/b", "teacher_mode": "cached"},
            "teacher_mode='cached': here the teacher is live, and gets the student's own tensors",
        ),
        (
            {"teacher_model": "TEACHER", "teacher_model_name": "a/b"}
            | {"teacher_query_instruction": "q: "},
            "teacher_query_instruction='q: ': here the teacher is live",
        ),
    ],
)
def test_a_teacher_that_a_trainer_cannot_follow_is_refused(
    clip_folder: Path, given: dict[str, Any], message: str
) -> None:
    arguments = {
        key: given[key] for key in given if key in ("distillation_loss_fn", "teacher_model")
    }
    settings = {key: given[key] for key in given if key not in arguments}
    config = {"model_name": str(clip_folder), **settings}
    if arguments.get("teacher_model") == "TEACHER":
        named = {"teacher_model_name": str(clip_folder)}
        arguments = {"teacher_model": published.build_teacher_model(named)}
    with pytest.raises(ConfigError, match=message):
        published.Trainer(
            published.build_model({"model_name": str(clip_folder)}),
            optimizer=None,
            dataloader=[{}],
            criterion=None,
            engine=None,
            config=config,
            **arguments,
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("save_total_limit", 2),
        ("best_metric", "mrr"),
        ("save_async", True),
        ("on_save_error", "warn"),
        ("node_local_output", True),
    ],
)
def test_the_class_trainer_refuses_keys_of_checkpoints(
    clip_folder: Path, tmp_path: Path, key: str, value: Any
) -> None:
    (tmp_path / "val.jsonl").write_text("{}\n")
    settings = {"val_data_path": str(tmp_path / "val.jsonl"), key: value}
    with pytest.raises(ConfigError, match=f"{key}={value!r}: the class Trainer writes model fol"):
        published.Trainer(
            published.build_model({"model_name": str(clip_folder)}),
            optimizer=None,
            dataloader=[{}],
            criterion=None,
            engine=None,
            config={"model_name": str(clip_folder), **settings},
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"use_gradient_cache": True, "gradient_cache_chunk_size": "auto"},
            "chunk_size='auto': the class Trainer cannot choose",
        ),
        ({"use_torch_compile": True}, "use_torch_compile=True: the class Trainer gets batches"),
    ],
)
def test_the_class_trainer_refuses_what_it_cannot_follow(
    clip_folder: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        published.Trainer(
            published.build_model({"model_name": str(clip_folder)}),
            optimizer=None,
            dataloader=[{}],
            criterion=None,
            engine=None,
            config={"model_name": str(clip_folder), **settings},
        )


def test_the_class_trainer_overwrites_no_checkpoint(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before training, and before the earlier run's metrics are begun anew."""
    (tmp_path / "checkpoint-step-7").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr(trainer.comm, "run_together", lambda work, doing: work())
    with pytest.raises(CheckpointError, match=r"checkpoint-step-7: an earlier run's.*another outp"):
        published.Trainer(
            published.build_model({"model_name": str(clip_folder)}),
            optimizer=None,
            dataloader=[{}],
            criterion=None,
            engine=None,
            config={"model_name": str(clip_folder), "output_dir": str(tmp_path)},
        )
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_the_class_trainer_says_how_it_goes_on() -> None:
    """It has no ``--resume``."""
    stopped = object.__new__(published.Trainer)
    stopped.step, newest = 3, Path("out/checkpoint-step-3")
    stopped._saves = Saves(
        write=lambda step: newest,
        finish=lambda: newest,
        failure=lambda: None,
        minutes=None,
        newest=newest,
    )
    assert stopped._place_to_go_on() == (
        "at step 3, checkpoint out/checkpoint-step-3: to go on, load_checkpoint(path, engine), and "
        "train into another output_dir"
    )
    assert "--resume auto" in TrainingLoop.how_to_go_on


def test_model_and_state_get_their_name_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(saved: Path, out: Path, **options: Any) -> None:
        assert out.name == "final", "the model card shows it"
        out.mkdir(parents=True)
        (out / "config.json").touch()

    monkeypatch.setattr(checkpoint, "export_model", export)
    state, path = tmp_path / ".final.training_state", tmp_path / "final"
    with pytest.raises(CheckpointError, match="nothing of final was left there"):
        checkpoint._finish(state, state, path, trust_remote_code=False)  # there is no state
    assert not list(tmp_path.iterdir())
    state.mkdir()
    checkpoint._finish(state, state, path, trust_remote_code=False)
    assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "training_state"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_teacher_of_other_inputs_than_the_students_is_refused(
    clip_folder: Path, minilm: str
) -> None:
    config = {"model_name": str(clip_folder), "teacher_model_name": minilm}
    with pytest.raises(ConfigError, match="embeds text only, and is given the student's image too"):
        published.Trainer(
            published.build_model(config),
            optimizer=None,
            dataloader=[{}],
            criterion=None,
            engine=None,
            config=config,
            teacher_model=published.build_teacher_model(config),
        )


def test_what_does_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(1, 1)
    config = {"model_name": "a/b"}
    with caplog.at_level(logging.INFO, logger="vembed_ds"):
        assert published.enable_static_graph(model, config, None) is model
        assert published.apply_lora(model, config) is model
    assert "DeepSpeed reduces gradients, not DDP" in caplog.text
    assert "use_lora is false" in caplog.text


def test_the_command_line_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name: a/b\ndata_path: c/d\nuse_fsdp: true\n")
    config = published.load_and_parse_config(
        ["--config", str(path), "--config_override", "batch_size=7", "--gradient_checkpointing"]
    )
    assert config["batch_size"] == 7
    assert published.get_distributed_config(config) == (True, False, False)
    assert "there is no FSDP here" in caplog.text
    same = published.load_and_parse_config(config=path, overrides=["batch_size=7"])
    assert same["batch_size"] == 7
    mine = published.get_distributed_config({"model_name": "a/b", "use_gradient_cache": True})
    assert mine == (False, True, False)


@pytest.mark.parametrize(
    ("config", "fits", "contradicts"),
    [
        ({"model_type": "bert"}, "e5", "siglip"),
        ({"model_type": "dinov2"}, "vit", "bert"),
        ({"model_type": "siglip"}, "clip", "qwen-vl"),
        ({"model_type": "qwen2_vl"}, "qwen-vl", "qwen"),
    ],
)
def test_a_named_family_may_not_contradict_the_models_config(
    config: dict[str, Any], fits: str, contradicts: str
) -> None:
    spec = ModelSpec({"": BackboneSource(config=config)})
    check_family(fits, spec)
    check_family("auto", spec)
    with pytest.raises(ConfigError) as caught:
        check_family(contradicts, spec)
    assert f"encoder_mode={contradicts}: names" in str(caught.value)
    assert f"model_type={config['model_type']}" in str(caught.value)
