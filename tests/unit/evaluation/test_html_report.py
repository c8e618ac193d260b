"""The page: what it says, that it needs nothing from elsewhere, and how a browser shows it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vembed_ds.errors import ConfigError, DataError
from vembed_ds.evaluation.comparison import Interval
from vembed_ds.evaluation.html_report import (
    Charts,
    Content,
    Example,
    chance_points,
    recall_points,
    write_html,
)
from vembed_ds.evaluation.report import Evaluation

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
# A page cannot report itself: this is put in, runs after loading, and leaves its findings in an
# attribute that --dump-dom shows.
PROBE = """
<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(e =>
    !e.closest("svg") && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  const cut = [...document.querySelectorAll("td, th, .value, .name, figcaption, h1, h2")].filter(e =>
    e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != "inline");
  const pictures = [...document.images].filter(i => !i.naturalWidth || !i.width);
  const texts = [...document.querySelectorAll("svg text")].filter(t => {
    const box = t.getBoundingClientRect(), all = t.closest("svg").getBoundingClientRect();
    return box.left < all.left - 2 || box.right > all.right + 2 || box.bottom > all.bottom + 2;
  });
  const found = {
    wide: wide.map(e => e.className || e.tagName), cut: cut.map(e => e.textContent),
    pictures: pictures.length, images: document.images.length, texts: texts.map(e => e.textContent),
    requests: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).map(r => r.name),
    scroll: document.documentElement.scrollWidth, width: document.documentElement.clientWidth,
    height: document.documentElement.scrollHeight,
    background: getComputedStyle(document.body).backgroundColor,
  };
  document.body.setAttribute("data-found", JSON.stringify(found));
});
</script>
"""

COLLECT = """
<script>
addEventListener("load", () => document.body.setAttribute("data-found", "[" +
  [...document.querySelectorAll("iframe")].map(f => f.contentDocument.body.dataset.found) + "]"));
</script>
"""


def evaluation(**changes: Any) -> Evaluation:
    metrics = {"recall@1": 0.25, "recall@10": 0.75, "mrr": 0.4, "ndcg@10": 0.5}
    dims = {f"{name}_d{dim}": value / 2 for name, value in metrics.items() for dim in (64, 128)}
    fields: dict[str, Any] = {
        "model": "output/<b>model</b>",
        "data": ["val & more.jsonl"],
        "retrieval_mode": "t2i",
        "metrics": {**metrics, **dims, "num_queries": 1234, "num_documents": 5678},
        "before": {**{name: value / 3 for name, value in metrics.items()}, "mrr": 0.6},
        "before_name": "a-rather-long/name-of-another-model",
        "intervals": {
            "recall@1": Interval(0.1, 0.2),
            "recall@10": Interval(-0.1, 0.6),
            "mrr": Interval(-0.3, -0.1),
        },
        "notes": ["3 of 1237 queries are left out"],
        "settings": {"query_instruction": "search: ", "ranks": 2},
        "versions": {"torch": "2.13.0"},
    }
    return Evaluation(**{**fields, **changes})


def charts(size: int = 400) -> Charts:
    generator = np.random.default_rng(0)
    ranks = np.ceil(5678 ** generator.random(size)).astype(int)
    return Charts(
        ranks=ranks,
        answers=generator.integers(1, 4, size),
        num_documents=5678,
        right_scores=generator.normal(0.6, 0.1, size),
        wrong_scores=np.append(generator.normal(0.4, 0.1, size - 1), -np.inf),
        before_ranks=np.minimum(ranks * 3, 5678),
    )


def picture(number: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    return Image.new("RGB", size, (40 * number % 255, 90, 200 - 20 * number))


def examples(kind: str) -> list[Example]:
    def content(number: int) -> Content:
        text = f"document {number}: " + "a sentence of some length about it, " * (number % 4 * 3)
        image = picture(number, (60 + 40 * (number % 3), 60 + 400 * (number % 2)))
        return Content(text if kind != "images" else None, image if kind != "texts" else None)

    query = Content("how <i>many</i> legs? " + "anunbrokenword" * 9, None)
    rows = [content(number) for number in range(5)]
    right = [False, True, False, False, False]
    return [
        Example(query, rows, right, rank=2),
        Example(Content(None, picture(3)), rows, [False] * 5, rank=41234, answer=content(6)),
    ]


def write(path: Path, kind: str = "images", **changes: Any) -> str:
    first, last = examples(kind)
    write_html(path, evaluation(**changes), charts(), examples=[first], failures=[last] * 2)
    return path.read_text(encoding="utf-8")


def test_figures_are_told(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", write(tmp_path / "new" / "report.html"))
    assert "<td>Recall@1</td><td>8.3 %</td><td>25.0 %</td>" in text
    assert (
        '<span class="better">+16.7 points</span> <span class="range">[+10.0, +20.0]</span>' in text
    )
    assert '<span class="worse">-0.200</span> <span class="range">[-0.300, -0.100]</span>' in text
    undecided = '<span class="">+50.0 points</span> <span class="range">[-10.0, +60.0]</span>'
    assert undecided in text, "an interval that holds 0 says neither better nor worse"
    assert '<div class="name">queries</div> <div class="value">1,234</div>' in text
    assert "3 of 1237 queries are left out" in text
    assert "right answer at rank 41,234" in text
    assert "<td>query_instruction</td><td>search: </td>" in text
    assert [title for title in ("Recall@k", "Ranks", "Similarities", "Fewer dimensions") if f"<figcaption>{title}<" in text] == ["Recall@k", "Ranks", "Similarities", "Fewer dimensions"]  # fmt: skip
    assert text.count("<svg") == 4


def test_without_a_comparison(tmp_path: Path) -> None:
    metrics = {"recall@1": 0.25, "mrr": 0.4}
    text = write(tmp_path / "r.html", metrics=metrics, before=None, intervals={}, notes=[])
    assert "<th>change</th>" not in text
    assert "confidence" not in text
    assert "Fewer dimensions" not in text


def test_right_ones_are_framed(tmp_path: Path) -> None:
    text = write(tmp_path / "r.html")
    assert text.count('class="cell image right"') == 1
    assert text.count('class="cell image"') == 4 + 2 * 5 + 2


def test_what_others_wrote_stays_text(tmp_path: Path) -> None:
    text = write(tmp_path / "r.html")
    assert "output/&lt;b&gt;model&lt;/b&gt;" in text
    assert "val &amp; more.jsonl" in text
    assert "how &lt;i&gt;many&lt;/i&gt; legs?" in text
    assert "<b>" not in text
    assert "<script" not in text


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    text = write(tmp_path / "r.html")
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "default-src 'none'" in text
    links = re.findall(r'(?:src|href)="([^"]{0,12})', text)
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names)), "plots share no names"
    assert {name.partition("#")[2] for name in re.findall(r"url\(#[^)]*", text)} <= set(names)
    assert not re.findall(r"#0[1-5]0[1-5]0[1-5]", text), "colors are those of the page"


def test_pictures_are_small_and_kept_in_shape(tmp_path: Path) -> None:
    shown = Content(None, Image.effect_noise((3000, 1500), 50))
    transparent = Content(None, Image.new("RGBA", (10, 10), (255, 0, 0, 0)))
    rows = [Example(Content("q"), [shown, transparent], [True, False], rank=1)]
    write_html(tmp_path / "r.html", evaluation(), charts(), examples=rows, failures=[])
    found = re.findall(r"data:image/(\w+);base64,([^\"]+)", (tmp_path / "r.html").read_text())
    first, last = (Image.open(io.BytesIO(base64.b64decode(data))) for _, data in found)
    assert [kind for kind, _ in found] == ["jpeg", "png"], "the smaller of both"
    assert first.size == (176, 88)
    assert last.convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_chance_equals_counting() -> None:
    """Of 5 documents in all 120 orders."""
    import itertools

    orders = list(itertools.permutations(range(5)))
    answers = np.array([1, 1, 3])
    for k, found in chance_points(answers, num_documents=5, most=4):
        hits = [sum(min(order[:right]) < k for order in orders) / len(orders) for right in answers]
        assert found == pytest.approx(np.mean(hits))


def test_recall_over_k() -> None:
    found = recall_points(np.array([1, 2, 2, 9]), most=3)
    assert found == [(1, 0.25), (2, 0.75), (3, 0.75)]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib.figure"])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=r"not installed; run pip install 'vembed-ds\[evaluate\]'"
    ):
        write(tmp_path / "r.html")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "r.html")


def browse(page: Path, size: tuple[int, int], *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars", "--no-first-run", "--disable-extensions", "--virtual-time-budget=3000",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={size[0]},{size[1]}", *flags, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console(log: str) -> Sequence[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium: apt-get install chromium, or bash launch/system_packages.sh",
)
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_browser_shows_all_of_it(tmp_path: Path, kind: str) -> None:
    """On a phone and on a desktop; nothing is cut off, wanted from elsewhere or complained about."""
    page = tmp_path / "report.html"
    text = write(page, kind)
    policy = re.search(r"<meta http-equiv=[^>]*>", text)
    assert policy is not None
    # Without the policy, which forbids scripts; in frames, as a window has 500 pixels at least.
    probed = html.escape(text.replace(policy[0], "").replace("</main>", "</main>" + PROBE))
    widths = (360, 390, 768, 1280)
    frames = [
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{probed}"></iframe>'
        for width in widths
    ]
    host = tmp_path / "host.html"
    host.write_text("<!doctype html><body>" + "".join(frames) + COLLECT)
    result = browse(host, (1400, 900), "--dump-dom")
    told = re.search(r'data-found="([^"]*)"', result.stdout)
    assert told is not None, result.stderr[-2000:]
    for width, found in zip(widths, json.loads(html.unescape(told[1])), strict=True):
        assert found["width"] == width
        assert not found["wide"], width
        assert found["scroll"] == width
        assert not found["cut"]
        assert not found["texts"], "of the plots"
        assert not found["requests"]
        assert (found["pictures"], found["images"] > 0) == (0, True)
    assert not console(result.stderr)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_screenshots(tmp_path: Path) -> None:
    """Of the page itself, with its policy; the dark one is dark."""
    page = tmp_path / "report.html"
    write(page)
    brightness = {}
    for name, flags in {"light": [], "dark": ["--force-dark-mode"]}.items():
        target = tmp_path / f"{name}.png"
        result = browse(page, (900, 2400), f"--screenshot={target}", *flags)
        assert not console(result.stderr)
        pixels = np.asarray(Image.open(target).convert("RGB"))
        assert pixels.shape == (2400, 900, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
        brightness[name] = pixels[5, 5].mean()
    assert brightness["light"] > 200
    assert brightness["dark"] < 60
