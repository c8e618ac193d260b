"""The site is built without a warning and without a network, and shows everything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from vembed_ds.config.schema import SECTIONS

ROOT = Path(__file__).parent.parent.parent
NO_NETWORK = ("unshare", "-rn")
pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


class Page(HTMLParser):
    """The ids of a page, where it links to, and what a browser fetches for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.ids.add(found.get("id", ""))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and "href" in found:
            self.fetched.append(found["href"])
        elif "src" in found:
            self.fetched.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "-f", ".ci/mkdocs.yml", "-d", str(folder)]
    alone = shutil.which("unshare") and not subprocess.run([*NO_NETWORK, "true"]).returncode
    done = subprocess.run(
        [*(NO_NETWORK if alone else ()), *command],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_document_is_a_page(site: Path) -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert (site / f"{path.stem}.html").is_file()
    for folder in (
        "benchmarks",
        "examples",
        *(f"examples/{name}" for name in ("emoji", "docstrings", "gallery")),
    ):
        assert (site / folder / "index.html").is_file()


def test_every_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    dead = []
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            address = urlsplit(link)
            if address.scheme or address.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].ids if target in pages else {unquote(address.fragment)}
            if not target.exists() or (address.fragment and unquote(address.fragment) not in known):
                dead.append(f"{path.name}: {link}")
    assert dead == []


def test_a_page_fetches_nothing_from_a_network(pages: dict[Path, Page]) -> None:
    assert [link for page in pages.values() for link in page.fetched if urlsplit(link).netloc] == []


def test_every_key_can_be_linked_to(site: Path, pages: dict[Path, Page]) -> None:
    keys = {key for section in SECTIONS.values() for key in section.model_fields}
    assert keys <= pages[site / "configuration.html"].ids


def test_every_command_says_its_help(site: Path) -> None:
    text = (site / "commands.html").read_text()
    modules = [p for p in (ROOT / "vembed_ds").glob("*.py") if "def build_parser" in p.read_text()]
    assert len(modules) >= 6
    assert text.count("usage: ") == len(modules)


def test_docstrings_are_shown_without_the_marks_of_another_format(site: Path) -> None:
    text = (site / "api.html").read_text()
    for name in ("Encoder", "Trainer", "build_loss", "ConfigError"):
        assert re.search(rf'id="vembed_ds\.[\w.]+\.{name}"', text), name
    assert not re.search(r":\w+:<code>", text)
