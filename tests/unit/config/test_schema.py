from __future__ import annotations

import runpy

from vembed_ds.config.schema import ALIASES, SECTION_OF, SECTIONS, Config
from vembed_ds.config.table import config_table


def test_leaf_names_are_unique_and_no_section_or_alias():
    leaves = [name for schema in SECTIONS.values() for name in schema.model_fields]
    assert len(leaves) == len(set(leaves)) == len(SECTION_OF)
    assert not set(leaves) & (set(SECTIONS) | set(ALIASES))
    assert set(ALIASES.values()) <= set(leaves)
    assert list(SECTIONS) == list(Config.model_fields)


def test_every_field_is_described_in_one_line():
    for schema in SECTIONS.values():
        for name, field in schema.model_fields.items():
            assert field.description, name
            assert "\n" not in field.description, name


def test_defaults_are_those_of_the_readme():
    optimizer, training = SECTIONS["optimizer"](), SECTIONS["training"]()
    assert optimizer.model_dump() == {
        "lr": 2e-5,
        "text_encoder_lr": None,
        "image_encoder_lr": None,
        "projection_lr": None,
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "warmup_steps": 0,
    }
    assert training.model_dump()["batch_size"] == 32
    assert training.model_dump()["gradient_self_test"] is True


def test_the_table_lists_every_key_once():
    table = config_table()
    for leaf in SECTION_OF:
        assert table.count(f"\n| `{leaf}`") == 1
    assert "| `lr` (`learning_rate`) | `2e-05` | Highest learning rate. |" in table
    assert "| `data_path` | `null` |" in table


def test_the_table_is_a_command(capsys):
    runpy.run_path(config_table.__code__.co_filename, run_name="__main__")
    assert capsys.readouterr().out == config_table()
