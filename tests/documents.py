"""What the documents show in fenced blocks, and how each command in them is tested."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
)
_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")
_SET = re.compile(r"^\w+=")
_BETWEEN = re.compile(r"^[;&|]+$")  # one command ends, the next one begins
_REDIRECT = re.compile(r"^(\d?[<>]+&?\d?)$")

# A program that starts another one: what stands behind it is looked at instead.
STARTERS = {"srun", "mpirun", "unshare", "nohup", "time", "exec", "env", "setsid", "ssh", "docker"}
# Programs that are not ours, and are therefore not tried.
OTHERS = {
    *("cat", "cd", "cp", "echo", "head", "ls", "mkdir", "mv", "rm", "rsync", "tail"),
    *("source", "export", "set", "trap", "wait", "sleep", "for", "do", "done", "if", "then", "fi"),
    *("git", "tensorboard", "swanlab", "mlflow", "wandb", "mkdocs", "ip", "dmesg", "unset", "scp"),
    *(
        "sbatch",
        "scontrol",
        "squeue",
        "kubectl",
        "hostname",
        "chmod",
        "ulimit",
        "module",
        "apt-get",
    ),
}
EXECUTED = {"vembed_ds.validate", "vembed_ds.plan"}  # on small data, with `--config my.yaml`


class Block(NamedTuple):
    """A fenced block."""

    document: str  # from the repository's folder
    line: int  # of its first line
    language: str
    text: str


class Command(NamedTuple):
    """One command of a block, without what sets variables, redirects or starts it."""

    block: Block
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def module(self) -> str | None:
        """Of ours, that it runs: ``vembed_ds.train``."""
        if self.program == "vembed-ds":
            named = [word for word in self.words[1:] if not word.startswith("-")]
            return f"vembed_ds.{named[0].replace('-', '_')}" if named else "vembed_ds.cli"
        return next(
            (w for w in self.words if re.fullmatch(r"(vembed_ds|benchmarks)\.\w+", w)), None
        )

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of :attr:`module`."""
        name = self.module or ""
        spellings = (name, name.removeprefix("vembed_ds.").replace("_", "-"))
        place = next((i for i, word in enumerate(self.words) if word in spellings), 0)
        return self.words[place + 1 :]

    @property
    def treatment(self) -> str:
        """How it is tested; ``"not at all"`` is an error."""
        if self.module and self.module in EXECUTED and "my.yaml" in self.words:
            return f"executed, {self.module}"
        if self.module:
            return f"parsed by {self.module}"
        if self.program in ("python", "python3", "bash", "deepspeed", "torchrun", "pip"):
            return f"looked at, {self.program}"
        return f"left to {self.program}" if self.program in OTHERS else "not at all"


def blocks(document: Path) -> Iterator[Block]:
    """Every fenced block, without the indentation of a list that it stands in."""
    text, name = document.read_text(), str(document.relative_to(ROOT))
    for found in _FENCE.finditer(text):
        indent = found[1]
        lines = [line.removeprefix(indent) for line in found[3].splitlines()]
        line = text.count("\n", 0, found.start()) + 2
        yield Block(name, line, found[2], "".join(f"{line}\n" for line in lines))


def commands(block: Block) -> Iterator[Command]:
    """Every command of a block of shell lines."""
    for line in _lines(block.text):
        for words in _simple_commands(line):
            if found := _inner(words):
                yield Command(block, found)
            elif inner := _quoted(words):
                yield from commands(block._replace(text=inner))


def _lines(text: str) -> Iterator[str]:
    """Logical lines: continuations joined, the texts of here-documents left out."""
    end = None
    for line in text.replace("\\\n", " ").splitlines():
        if end is not None:
            end = None if line.strip() == end else end
            continue
        if found := _HEREDOC.search(line):
            end, line = found[1], line[: found.start()]
        yield line


def _simple_commands(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words: list[str] = []
    redirected = False
    for word in lexer:
        if _BETWEEN.match(word):
            yield words
            words = []
        elif _REDIRECT.match(word):
            redirected = True
        elif redirected:
            redirected = False  # the file's name
        else:
            words.append(word)
    yield words


def _inner(words: list[str]) -> tuple[str, ...]:
    """Without variables in front, and behind what starts another program."""
    rest = list(words)
    while rest and _SET.match(rest[0]):
        rest.pop(0)
    if rest[:2] == ["bash", "launch/restart.sh"]:
        return _inner(rest[3:])
    if rest and rest[0] in STARTERS:
        known = [i for i, word in enumerate(rest) if i and word in _PROGRAMS]
        return tuple(rest[known[0] :]) if known else ()
    return () if rest[:1] in (["sh"], ["bash"]) and "-c" in rest else tuple(rest)


_PROGRAMS = {"python", "python3", "deepspeed", "torchrun", "vembed-ds"}


def _quoted(words: list[str]) -> str | None:
    """The commands in ``sh -c "..."``."""
    return words[words.index("-c") + 1] if "-c" in words and {"sh", "bash"} & set(words) else None


if __name__ == "__main__":
    for document in DOCUMENTS:
        for block in blocks(document):
            for command in commands(block) if block.language == "bash" else ():
                place = f"{block.document}:{block.line}"
                shown = " ".join(command.words)[:100]
                sys.stdout.write(f"{place:45} {command.treatment:40} {shown}\n")
