"""No command, setting or import in a document is wrong; `python -m tests.documents` lists how each is tested.

What trains is run as it is written by the slow tests `tests/integration/test_readme_commands.py` and
`tests/integration/test_start_page.py`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents import DOCUMENTS, OTHERS, ROOT, Block, Command, blocks, commands
from vembed_ds.config.loading import load_config
from vembed_ds.config.schema import ALIASES, SECTIONS
from vembed_ds.errors import ConfigError

LANGUAGES = {"bash", "yaml", "json", "jsonl", "python", "text", "", "dockerfile", "ini"}
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
COMMANDS = [command for block in SHELL for command in commands(block)]
RUN = [c for c in COMMANDS if c.treatment.startswith("executed")]
OURS = ("vembed_ds.", "benchmarks.", "vembed-ds", "deepspeed ", "torchrun ")
PAIRS, NUM_PAIRS = "pairs.jsonl", 24
# What a command or a file of settings may say here, because only a reader has the files.
ELSEWHERE = re.compile(r"error: --\w+ \.\./\S+: nothing there$", re.MULTILINE)
MISSING = re.compile(r"no such (file|folder)|is no installed package")


def place(value: Block | Command) -> str:
    block, rest = (value, "") if isinstance(value, Block) else (value.block, f" {value.treatment}")
    return f"{block.document}:{block.line}{rest}"


def test_every_block_has_a_language_that_is_looked_at() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
    for block in BLOCKS:
        if block.language in ("", "text"):
            lines = [line.lstrip("$ ") for line in block.text.splitlines()]
            assert not [line for line in lines if line.startswith(("python -m", *OURS))], place(
                block
            )


def test_no_command_is_left_out() -> None:
    assert [place(c) for c in COMMANDS if c.treatment == "not at all"] == []
    assert len(RUN) >= 4
    assert {c.module for c in COMMANDS} >= {"vembed_ds.train", "vembed_ds.convert"}


def test_commands_are_found_wherever_they_stand() -> None:
    text = (
        "A=1 python -m vembed_ds.plan --gpus 8 > a.txt  # said\n"
        "srun --ntasks 8 vembed-ds train --config a.yaml && cat a.txt\n"
        "cat > a.yaml <<'EOF'\npython -m none\nEOF\n"
        "bash launch/restart.sh 3 deepspeed --module vembed_ds.train --resume auto \\\n    --lr 1\n"
        'unshare -rn sh -c "ip link; python -m benchmarks.run W1"\n'
        "ls | teleport\n"
    )
    found = list(commands(Block("a.md", 1, "bash", text)))
    assert [c.module or c.program for c in found] == [
        *("vembed_ds.plan", "vembed_ds.train", "cat", "cat", "vembed_ds.train", "ip"),
        *("benchmarks.run", "ls", "teleport"),
    ]
    assert found[0].arguments == ("--gpus", "8")
    assert found[1].arguments == ("--config", "a.yaml")
    assert found[4].arguments == ("--resume", "auto", "--lr", "1")
    assert found[-1].treatment == "not at all"


def test_nothing_of_ours_is_left_to_others() -> None:
    assert not OTHERS & {"python", "python3", "deepspeed", "torchrun", "vembed-ds", "bash", "pip"}


@pytest.mark.parametrize("block", SHELL, ids=place)
def test_the_shell_reads_it(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.program not in OTHERS and c not in RUN], ids=place
)
def test_its_own_parser_takes_it(command: Command) -> None:
    words = [re.sub(r"\$\{?\w+\}?", "1", word) for word in command.words]
    if command.module:
        arguments = [re.sub(r"\$\{?\w+\}?", "1", word) for word in command.arguments]
        if command.program == "vembed-ds":
            _, arguments = _launching("flags").split(arguments, prog="vembed-ds")
        parsed(parser_of(command.module), arguments)
    if command.program == "deepspeed":
        runner = importlib.import_module("deepspeed.launcher.runner")
        found = parsed(runner.parse_args, words[1:])
        assert found.module or found.user_script.endswith(".py"), "deepspeed wants --module"
    elif command.program == "torchrun":
        run = importlib.import_module("torch.distributed.run")
        assert parsed(run.get_args_parser().parse_args, words[1:]).training_script
    elif not command.module:
        check_files(words)


def check_files(words: Sequence[str]) -> None:
    """Of a command that is not ours: scripts and extras that it names exist."""
    if words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        named = {extra for found in extras for extra in found.split(",")}
        assert named <= set(project["optional-dependencies"]), words
    own = [
        word for word in words if word.startswith(("launch/", "examples/", "ds_configs/", "-c "))
    ]
    assert [word for word in own if not (ROOT / word).exists()] == []


def test_the_start_page_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "index.md").read_text()
    table = page.partition("| extra | what for |\n")[2].partition("\n\n")[0]
    named = [
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(named) == sorted(project["optional-dependencies"])


def parser_of(module: str) -> Callable[[list[str]], argparse.Namespace]:
    found = importlib.import_module(module)
    if hasattr(found, "build_parser"):
        parse: Callable[[list[str]], argparse.Namespace] = found.build_parser().parse_args
        return parse

    def from_command_line(arguments: list[str]) -> argparse.Namespace:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *arguments])
            namespace: argparse.Namespace = found._parse()
        return namespace

    return from_command_line


def parsed(parse: Callable[[list[str]], Any], arguments: Sequence[str]) -> Any:
    """What a parser makes of a command line; its complaint fails the test."""
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            return parse(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)  # 0: --help
    assert code == 0 or ELSEWHERE.search(said.getvalue()), said.getvalue()
    return argparse.Namespace(module=True, training_script="")


def _launching(name: str) -> Any:
    return importlib.import_module(f"vembed_ds.launching.{name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Iterator[Path]:
    """Where a reader of the documents is: the repository, and ``my.yaml`` with its data."""
    made = tmp_path_factory.mktemp("reader")
    for name in ("ds_configs", "examples"):
        (made / name).symlink_to(ROOT / name)
    for name, start in ((PAIRS, 0), ("val.jsonl", 100)):
        rows = [
            {"query": f"what is {n}", "positive": f"it is {n}"}
            for n in range(start, start + NUM_PAIRS)
        ]
        (made / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "my.yaml").write_text(yaml.safe_dump(settings(minilm)))
    before = Path.cwd()
    os.chdir(made)
    yield made
    os.chdir(before)


def settings(minilm: str) -> dict[str, Any]:
    layers = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "bert", "vocab_size": 30522, "intermediate_size": 32, **layers}
    return {
        "model_name": {"config": config, "processor": minilm},
        "retrieval_mode": "t2t",
        "data_path": PAIRS,
        "val_data_path": "val.jsonl",
        "use_gradient_cache": True,
        "batch_size": 2,
        "num_workers": 0,
    }


@pytest.mark.parametrize("command", RUN, ids=place)
def test_it_runs_as_it_is_written(
    command: Command, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.module is not None
    code = importlib.import_module(command.module).main(list(command.arguments))
    assert code == 0, capsys.readouterr()


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=place)
def test_settings_are_known_and_fit(block: Block, folder: Path, minilm: str) -> None:
    """Alone, or beside those of ``my.yaml``; whether the files are there is not asked."""
    shown = yaml.safe_load(block.text)
    if "apiVersion" in shown:
        return  # Kubernetes'
    known = {*SECTIONS, *ALIASES, *(key for s in SECTIONS.values() for key in s.model_fields)}
    assert set(shown) <= known
    base = {key: value for key, value in settings(minilm).items() if key != "num_workers"}
    for ours, instead in (("data_path", "datasets"), ("model_name", "text_model_name")):
        if instead in shown:
            del base[ours]
    path = folder / "shown.yaml"
    path.write_text(yaml.safe_dump(base | shown))
    problems: list[str] = []
    try:
        load_config(path)
    except ConfigError as error:
        problems = error.problems
    assert [problem for problem in problems if not MISSING.search(problem)] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=place)
def test_json_can_be_read(block: Block) -> None:
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=place)
def test_imports_exist(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vembed_ds"):
            module = importlib.import_module(str(node.module))
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("vembed_ds"):
                    importlib.import_module(alias.name)
