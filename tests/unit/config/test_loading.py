from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.memory import measure
from vembed_ds.config.compat import ENCODER_FAMILIES
from vembed_ds.config.loading import dump_config, load_config, parse_config
from vembed_ds.config.schema import Config
from vembed_ds.errors import ConfigError


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "train.jsonl").write_text("{}\n")
    return {
        "model_name": "some/model",
        "data_path": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def write(tmp_path: Path, base: dict[str, Any]):
    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text("\n".join(f"{k}: {v}" for k, v in base.items()) + "\n" + text)
        return path

    return _write


def problems_of(*args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(*args, **kwargs)
    return caught.value.problems


def test_flat_keys_sections_and_aliases_mix(write):
    config = load_config(
        write("learning_rate: 3e-4\ntraining: {batch_size: 7}\nrun.eval_recall_k: [1, 3]\n")
    )
    assert config.optimizer.lr == 3e-4
    assert config.training.batch_size == 7
    assert config.run.eval_recall_k == (1, 3)
    assert config.model.model_name == "some/model"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_scientific_floats_are_numbers_in_file_and_override(write, text):
    assert load_config(write(f"lr: {text}")).optimizer.lr == 1e-4
    assert load_config(write(""), [f"lr={text}"]).optimizer.lr == 1e-4


def test_yaml_1_1_surprises_are_gone(write):
    assert load_config(write("run_name: no")).run.run_name == "no"
    assert load_config(write("run_name: 2024-01-01")).run.run_name == "2024-01-01"
    assert load_config(write("run_name: 12:30")).run.run_name == "12:30"
    assert load_config(write("seed: 010")).training.seed == 10


def test_merge_keys_work(write):
    text = "optimizer: &a {lr: 1.0}\ntraining: {epochs: 2}\n"
    assert load_config(write(text)).optimizer.lr == 1.0


def test_an_integer_is_a_fine_float(write):
    lr = load_config(write("lr: 1")).optimizer.lr
    assert (lr, type(lr)) == (1.0, float)


def test_the_config_is_frozen(base):
    config = parse_config(base)
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("learnable_temperature=true", "loss", "learnable_temperature", True),
        ("max_steps=None", "training", "max_steps", None),
        ("max_steps=null", "training", "max_steps", None),
        ("report_to=none", "run", "report_to", "none"),
        ("report_to=wandb, tensorboard", "run", "report_to", "wandb,tensorboard"),
        ("report_to=[mlflow, wandb, mlflow]", "run", "report_to", "mlflow,wandb"),
        ("report_to=[]", "run", "report_to", "none"),
        ("eval_recall_k=[1, 2]", "run", "eval_recall_k", (1, 2)),
        ("column_mapping={query: text}", "data", "column_mapping", {"query": "text"}),
        ("training.batch_size=64", "training", "batch_size", 64),
        ("model_name_or_path=other", "model", "model_name", "other"),
        ("run_name='123'", "run", "run_name", "123"),
        ('run_name="true"', "run", "run_name", "true"),
        ("run_name=a=b", "run", "run_name", "a=b"),
        ("run_name=#3: x", "run", "run_name", "#3: x"),
        ("image_root=''", "data", "image_root", ""),
    ],
)
def test_overrides_are_typed_and_win(base, override, section, name, value):
    config = parse_config({**base, "batch_size": 1}, overrides=[override])
    assert getattr(getattr(config, section), name) == value


def test_a_whole_section_can_be_overridden(base):
    assert parse_config(base, overrides=["optimizer={lr: 0.5}"]).optimizer.lr == 0.5


def test_no_file_needs_overrides_only(base):
    config = load_config(None, [f"{key}={value}" for key, value in base.items()])
    assert config.training.batch_size == 32


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.yaml: no such config file; check the path"):
        load_config(tmp_path / "nope.yaml")


def test_unreadable_file(tmp_path):
    with pytest.raises(ConfigError, match="the config file cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_name: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: the config file cannot be read"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of `key: value` lines, found nothing"),
        ("- 1\n", "expected a mapping of `key: value` lines, found list"),
        ("a: 1\nb: [1,\n", r"bad\.yaml line 3: not readable as YAML: "),
        ("lr: 1\nepochs: 2\nlr: 1\n", r"bad\.yaml line 3: .*'lr' stands here a second time"),
        ("optimizer:\n  lr: 1\n  lr: 2\n", r"bad\.yaml line 3: .*'lr' stands here a second"),
        ("a: \x01", r"bad\.yaml: not readable as YAML: "),
        ("a: !!python/object:os.system {}", r"bad\.yaml line 1: .*python/object"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_unknown_keys_name_the_nearest(base):
    found = problems_of({**base, "learning_rat": 1, "optimizer": {"wieght_decay": 1}}, origin="f")
    assert found == [
        "learning_rat=1 (f): unknown key; did you mean learning_rate?",
        "optimizer.wieght_decay=1 (f): unknown key; did you mean weight_decay?",
    ]
    found = problems_of(base, overrides=["zzzzqq=1", "nowhere.lr=1", "column_mapping.query=a"])
    assert found[0] == "zzzzqq=1 (--config_override): unknown key; " + (
        "remove it (the README lists all keys)"
    )
    assert found[1].startswith("nowhere.lr=1 (--config_override): unknown key")
    assert found[2].startswith("column_mapping.query='a' (--config_override): unknown key")


def test_a_key_in_the_wrong_section(base):
    assert problems_of({**base, "optimizer": {"batch_size": 3}}, origin="f") == [
        "optimizer.batch_size=3 (f): batch_size belongs to section training; "
        "write training.batch_size, or batch_size outside sections"
    ]


@pytest.mark.parametrize("value", [None, 3, [1]])
def test_a_section_that_is_no_mapping(base, value):
    assert problems_of({**base, "loss": value}, origin="f") == [
        f"loss={value!r} (f): loss is a section; expected a mapping of its keys"
    ]


def test_one_setting_with_two_values(base):
    assert problems_of({**base, "lr": 1.0, "learning_rate": 2.0}, origin="f") == [
        "lr=1.0 and learning_rate=2.0 (f): one setting with two values; keep one"
    ]
    found = problems_of({**base, "epochs": 1, "training": {"epochs": 2}}, origin="f")
    assert found == ["epochs=1 and training.epochs=2 (f): one setting with two values; keep one"]
    found = problems_of(base, overrides=["lr=1", "learning_rate=2"])
    assert "lr=1 and learning_rate=2 (--config_override): one setting" in found[0]


def test_one_setting_with_one_value_twice_is_fine(base):
    assert parse_config({**base, "lr": 1.0, "learning_rate": 1}).optimizer.lr == 1.0


@pytest.mark.parametrize("token", ["epochs", "=3", "--lr", "lr=", "run_name= "])
def test_a_token_without_a_key_or_value_is_not_skipped(base, token):
    assert problems_of(base, overrides=[token]) == [
        f"{token!r} (--config_override): expected key=value"
    ]


def test_a_broken_list_in_an_override(base):
    (problem,) = problems_of(base, overrides=["eval_recall_k=[1,"])
    assert problem.startswith("eval_recall_k=[1, (--config_override) line 1: not readable as YAML")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("lr", "fast", "expected a number > 0"),
        ("lr", 0, "expected a number > 0"),
        ("lr", float("inf"), "expected a number > 0"),
        ("lr", True, "expected a number > 0"),
        ("weight_decay", -1, "expected a number >= 0"),
        ("adam_beta1", 1.0, "expected a number >= 0 and < 1"),
        ("warmup_ratio", 1.5, "expected a number >= 0 and <= 1"),
        ("batch_size", 64.0, "expected a whole number > 0"),
        ("batch_size", True, "expected a whole number > 0"),
        ("batch_size", "64", "expected a whole number > 0"),
        ("max_steps", 0, "expected a whole number > 0 or null"),
        ("gradient_checkpointing", "yes", "expected true or false"),
        ("gradient_checkpointing", 1, "expected true or false"),
        (
            "retrieval_mode",
            "v2i",
            "expected QUERY2POSITIVE with the letters t (text), i (image), m (text and image), "
            "x (what the record holds), for example t2i",
        ),
        (
            "encoder_mode",
            "resnet",
            "expected " + " or ".join(["auto", "composed", *ENCODER_FAMILIES]),
        ),
        ("pooling_method", "avg", "expected cls or mean or last_token or pooler or none or null"),
        ("projection_layers", True, "expected 1 or 2 or null"),
        ("projection_layers", 1.0, "expected 1 or 2 or null"),
        ("projection_layers", 3, "expected 1 or 2 or null"),
        ("run_name", 7, "expected non-empty text or null; put it in quotes"),
        ("image_root", 3, "expected text; put it in quotes"),
        ("temperature", 9e-5, "expected a number >= 0.0001"),
        ("temperature", 0, "expected a number >= 0.0001"),
        ("eval_recall_k", [1, 0], "expected a non-empty list of a whole number > 0"),
        ("eval_recall_k", [], "expected a non-empty list of a whole number > 0"),
        ("data_path", [], "expected non-empty text or a non-empty list of non-empty text or null"),
        ("column_mapping", ["query"], "expected a mapping of text to text"),
        ("column_mapping", {"query": 3}, "expected a mapping of text to text"),
        (
            "column_mapping",
            {"qury": "a"},
            "unknown role 'qury'; expected one of query, query_image, positive, positive_image, "
            "negatives, negative_images, label, score, pos_scores, neg_scores",
        ),
        (
            "image_augmentation",
            [{"A": {}, "B": {}}],
            "expected one class per list entry: [{ClassName: {argument: value}}, ...]",
        ),
        (
            "model_name",
            {"config": {}},
            'the model\'s config has no "model_type"; add it, for example resnet',
        ),
        (
            "model_name",
            {"config": {"model_type": "resnet"}, "processor": {"size": 3}},
            'the processor\'s settings have no "image_processor_type"; '
            "add it, for example ConvNextImageProcessor",
        ),
        (
            "model_name",
            {"config": {"model_type": "a"}, "x": 1},
            "unknown key x; expected non-empty text or a mapping with config, processor or null",
        ),
        (
            "model_name",
            {"processor": "a"},
            "missing key config; expected non-empty text or a mapping with config, processor or null",
        ),
        ("teachers", [{"scores": True, "weight": 0}], "[0].weight=0: expected a number > 0"),
        (
            "teachers",
            [{"scores": True}, {"model_name": "a/b", "mode": "off"}],
            "[1].mode='off': expected live or cached or first_epoch or null",
        ),
        (
            "teachers",
            [{"model_nam": "a/b"}],
            "unknown key model_nam; expected a list of a mapping with name, model_name, ema_decay, "
            "scores, weight, temperature, mode, ds_config, precision, query_instruction, "
            "document_instruction",
        ),
    ],
)
def test_wrong_values_name_key_value_origin_and_rule(base, key, value, rule):
    assert problems_of({**base, key: value}, origin="f") == [f"{key}={value!r} (f): {rule}"]


def test_required_key(base):
    del base["data_path"]
    assert problems_of(base) == [
        "data_path: required, but not given; set data_path, or datasets for several"
    ]


def test_all_problems_come_together_without_pydantic_words(base):
    values = {**base, "oops": 1, "lr": "x", "warmup_steps": 9, "max_steps": 5, "epochs": 0}
    found = problems_of(values, overrides=["seed", "optimizer.lr=y", "precision=fp8"])
    text = "\n".join(found)
    for part in ("oops=1", "'seed'", "optimizer.lr='y'", "precision='fp8'", "warmup_steps=9"):
        assert part in text
    assert "epochs=0" in text
    assert len(found) == 6
    assert not any(word in text.lower() for word in ("pydantic", "http", "validation error"))


def test_scratch_model_and_list_of_paths(base, tmp_path):
    scratch = {
        "config": {"model_type": "resnet", "hidden_sizes": [64, 128]},
        "processor": {"image_processor_type": "ConvNextImageProcessor"},
    }
    (tmp_path / "b.csv").write_text("query\n")
    base |= {"model_name": scratch, "data_path": [base["data_path"], str(tmp_path / "b.csv")]}
    config = parse_config(base)
    assert config.model.model_name.config["hidden_sizes"] == [64, 128]
    assert config.data.data_path == tuple(base["data_path"])
    assert parse_config_text(dump_config(config), tmp_path) == config


def parse_config_text(text: str, folder: Path) -> Config:
    path = folder / "dumped.yaml"
    path.write_text(text)
    return load_config(path)


TRICKY_TEXTS = [
    "1e-4",
    "true",
    "no",
    "None",
    "null",
    "~",
    "12:30",
    "a: b # c",
    "ünï",
    " x\ty",
    "'",
    "<<",
]


def random_value(name: str, default: Any, rng: random.Random) -> Any:
    if isinstance(default, bool):
        return rng.random() < 0.5
    if isinstance(default, int):
        return rng.randint(1, 10**6)
    if isinstance(default, float):
        tiny = {"temperature": 1e-4, "spike_factor": 1.001}.get(name, 1e-15)
        return rng.choice([rng.random() * 0.99 + tiny, rng.random() * 1e-12 + tiny])
    if name == "run_name":
        return rng.choice(TRICKY_TEXTS)
    return default


@pytest.mark.parametrize("seed", range(25))
def test_a_dump_reads_back_as_equal(base, tmp_path, seed):
    rng = random.Random(seed)
    values = dict(base)
    for section in Config.model_fields.values():
        schema = (get_args(section.annotation) or (section.annotation,))[0]
        for name, field in schema.model_fields.items():
            if name not in base and rng.random() < 0.5:
                values[name] = random_value(name, field.default, rng)
    values |= {"run_name": rng.choice(TRICKY_TEXTS), "eval_steps": 0, "projection_layers": None}
    values["topk_tokens"] = 0
    # Others that are refused beside the rest.
    values |= dict.fromkeys(
        (
            *("use_dora", "use_rslora", "load_in_4bit", "streaming", "node_local_output"),
            "use_torch_compile",
        ),
        False,
    )
    for needs_another_key in ("guide_margin", "use_all_negatives", "shuffle_buffer"):
        values.pop(needs_another_key, None)
    for key in [key for key in values if key.startswith(("teacher_", "distillation_"))]:
        del values[key]
    if seed % 2:
        values["teachers"] = [{"model_name": "a/b", "mode": "cached"}, {"ema_decay": rng.random()}]
        values["distillation_alpha"] = rng.random()
    values["column_mapping"] = {"query": rng.choice(TRICKY_TEXTS)}
    values["num_workers"] = rng.choice([1, 3])
    if seed % 3 == 0:
        values |= {"num_workers": 0, "persistent_workers": False}
        values.pop("prefetch_factor", None)
    config = parse_config(values)
    assert parse_config_text(dump_config(config), tmp_path) == config


def test_a_dump_names_every_value_and_loads_with_zero_workers(base, tmp_path):
    text = dump_config(parse_config(base))
    assert "prefetch_factor: 2" in text
    assert "batch_size: 32" in text
    config = parse_config({**base, "num_workers": 0})
    assert parse_config_text(dump_config(config), tmp_path) == config


@pytest.mark.parametrize(
    "text",
    ["lr: !!python/object/apply:os.system [id]", "lr: !!python/name:os.system", "lr: !mine 3"],
)
def test_tags_make_no_python_objects(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"a.yaml line 1: not readable as YAML: could not determine"
    ):
        load_config(path, [])


LOAD = """
from pathlib import Path
try:
    outcome = load_config(Path(sys.argv[1]), [])
except Exception as error:
    outcome = type(error).__name__
"""
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"aliases \(\*name\) stand for more than 100000 values, or for themselves; write"),
        ("a: &a [*a]", "or for themselves"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deep; flatten it"),
        ("#" * 1_000_001, r"1000001 characters are no configuration \(at most 1000000\)"),
    ],
    ids=["laughs", "circle", "deep", "long"],
)
def test_yaml_that_would_fill_the_memory(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        load_config(path, [])
    assert time.monotonic() - started < 10
    megabytes, _ = measure("from vembed_ds.config.loading import load_config", LOAD, str(path))
    assert megabytes < 50


def test_aliases_work(write):
    config = load_config(write("run_name: &n mine\nquery_instruction: *n\n"))
    assert config.run.run_name == config.data.query_instruction == "mine"
