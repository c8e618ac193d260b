"""What the site has beside the pages in ``docs/``: other folders' pages, and what code writes."""

from __future__ import annotations

import argparse
import importlib
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from vembed_ds.config.table import config_table

ROOT = Path(__file__).parent.parent
# Linked from pages, and shown or offered as they are.
OUTSIDE: tuple[str, ...] = (
    "examples/**/*.md",
    "examples/**/*.yaml",
    "examples/**/*.py",
    "examples/**/*.jpg",
    "benchmarks/README.md",
)
OUTSIDE += ("ds_configs/*.json", "launch/**/*")
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(#[^)\s]+)?(?=\))")
# The README is no page: what links to it means one of these.
README = {"#configuration": "configuration.md", "": "index.md"}
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?")
FENCE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)
KEYS = "[All keys, their defaults and meanings](../README.md#configuration)"
HELP = "<!-- the help of every command -->"
COMMAND_WIDTH = "100"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of ``OUTSIDE`` at their places in the repository."""
    for pattern in OUTSIDE:
        for path in filter(Path.is_file, sorted(ROOT.glob(pattern))):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the generated parts, and turn links between folders into links of the site."""
    markdown = markdown.replace(KEYS, _keys()) if KEYS in markdown else markdown
    markdown = markdown.replace(HELP, _help()) if HELP in markdown else markdown
    parts = FENCE.split(markdown)
    parts[::2] = [
        LINK.sub(lambda found: _link(found[1], found[2] or "", page.file), part)
        for part in parts[::2]
    ]
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name classes as Sphinx wants them; here the name alone is shown."""
    return ROLE.sub("<code>", html)


def _link(target: str, anchor: str, file: File) -> str:
    """A link of a file in the repository as one of its page in the site."""
    here = Path(str(file.abs_src_path)).parent.relative_to(ROOT).as_posix()
    there = posixpath.normpath(posixpath.join(here, target)).removeprefix("docs/")
    if there == "README.md" and anchor in README:
        there, anchor = README[anchor], ""
    return posixpath.relpath(there, posixpath.dirname(file.src_uri) or ".") + anchor


def _keys() -> str:
    """The tables of keys with a heading for each section and an anchor for each key."""
    table = re.sub(r"^\*\*`(\w+)`\*\*$", r"## \1", config_table(), flags=re.MULTILINE)
    return re.sub(r"^\| `(\w+)`", r'| <a id="\1"></a>`\1`', table, flags=re.MULTILINE)


def _help() -> str:
    """``--help`` of every module of the package that has a ``build_parser``."""
    os.environ["COLUMNS"] = COMMAND_WIDTH  # what argparse takes for the terminal's width
    return "\n".join(
        f"## {_title(parser)}\n\n```text\n{parser.format_help().rstrip()}\n```\n"
        for parser in map(_parser, sorted(ROOT.glob("vembed_ds/*.py")))
        if parser is not None
    )


def _parser(path: Path) -> argparse.ArgumentParser | None:
    if "\ndef build_parser(" not in path.read_text():
        return None
    parser = importlib.import_module(f"vembed_ds.{path.stem}").build_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def _title(parser: argparse.ArgumentParser) -> str:
    return parser.prog.split()[-1].removeprefix("vembed_ds.")
