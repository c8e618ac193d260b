"""Plots of an evaluation as SVG to be put into a page, in the page's colors and font."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vembed_ds.errors import ConfigError

Array = np.ndarray[Any, Any]
Points = Sequence[tuple[float, float]]

SIZE = (5.4, 3.3)  # inches; the page scales it
# Stand-ins that no plot uses otherwise; the page's style has light and dark values for them.
COLORS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--line)",
    "#040404": "var(--after)",
    "#050505": "var(--before)",
}
INK, FAINT, LINE, AFTER, BEFORE = COLORS
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
}


def check_matplotlib(flag: str) -> None:
    """Refuse to draw without matplotlib.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{flag}: drawing needs matplotlib, which is not installed; "
            "run pip install 'vembed-ds[evaluate]'"
        ) from error


def recall_curve(curves: Mapping[str, Points], *, chance: Points) -> str:
    """Recall@k over k.

    Args:
        curves: One or two models by name, the later one first: ``(k, share)``.
        chance: What a model reaches that knows nothing.
    """

    def draw(axes: Any) -> None:
        _line(axes, chance, name="chance", color=FAINT, style=":")
        for (name, points), color in zip(curves.items(), (AFTER, BEFORE), strict=False):
            _line(axes, points, name=name, color=color)
        axes.set(xscale="log", xlabel="k", ylabel="Recall@k", ylim=(0, 1.02))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.legend(loc="best")

    return _svg(draw, "recall")


def rank_histogram(ranks: Array, *, most: int) -> str:
    """How many queries find their first right document at which rank.

    Args:
        ranks: ``[Q]`` from 1.
        most: Number of documents.
    """
    edges = [1, 2, 3, 4, 6, 11, 21, 51, 101]
    edges += [10**power * factor + 1 for power in range(2, 12) for factor in (2, 5, 10)]
    edges = [*(edge for edge in edges if edge <= most), most + 1]
    counts, _ = np.histogram(ranks, bins=edges)
    names = [f"{a:,}" if b - a == 1 else f"{a:,}-{b - 1:,}" for a, b in itertools.pairwise(edges)]

    def draw(axes: Any) -> None:
        axes.bar(range(len(counts)), counts / len(ranks), color=AFTER, width=0.8)
        axes.set_xticks(range(len(counts)), names, rotation=35, ha="right", fontsize=8)
        axes.set(xlabel="rank of the first right document", ylabel="queries")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.grid(visible=False, axis="x")

    return _svg(draw, "ranks")


def similarity_histogram(right: Array, wrong: Array) -> str:
    """Similarities of queries to their right documents and to the best wrong one.

    Args:
        right: ``[P]``.
        wrong: ``[Q]``; those that are not finite are left out.
    """
    wrong = wrong[np.isfinite(wrong)]
    both = np.concatenate([right, wrong])
    edges = np.linspace(both.min(), both.max() + 1e-6, 41)

    def draw(axes: Any) -> None:
        for values, color, name in (
            (wrong, BEFORE, "best wrong document"),
            (right, AFTER, "right documents"),
        ):
            weights = np.full(len(values), 1 / max(1, len(values)))
            axes.hist(values, bins=edges, weights=weights, color=color, alpha=0.55, label=name)
        axes.set(xlabel="similarity", ylabel="share")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.legend(loc="best")

    return _svg(draw, "similarity")


def dimension_curve(curves: Mapping[str, Points]) -> str:
    """Metrics over the number of dimensions that are kept.

    Args:
        curves: Metric to ``(dimensions, value)``; at most three.
    """

    def draw(axes: Any) -> None:
        for (name, points), color in zip(curves.items(), (AFTER, BEFORE, FAINT), strict=False):
            _line(axes, points, name=name, color=color, marker="o")
        dims = sorted({dim for points in curves.values() for dim, _ in points})
        axes.set(xscale="log", xlabel="dimensions", ylim=(0, 1.02))
        axes.set_xticks(dims, [f"{dim:.0f}" for dim in dims])
        axes.minorticks_off()
        axes.legend(loc="best")

    return _svg(draw, "dimensions")


def _line(
    axes: Any, points: Points, *, name: str, color: str, style: str = "-", marker: str = ""
) -> None:
    x, y = zip(*sorted(points), strict=True)
    label = name.replace("$", r"\$")  # which would start a formula
    axes.plot(x, y, style, color=color, label=label, marker=marker, linewidth=2, markersize=5)


def _svg(draw: Any, name: str) -> str:
    """An element ``svg`` that needs nothing from elsewhere."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    file = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True)
    return _for_a_page(file.getvalue(), name)


def _for_a_page(text: str, name: str) -> str:
    """Without size, names of formats and numbers of elements that another plot has too."""
    text = text[text.index("<svg") :]
    for useless in ("<metadata>.*?</metadata>", "<style.*?</style>"):
        text = re.sub(useless, "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", head)
    rest = re.sub(r'( id="| xlink:href="#|url\(#)', rf"\1{name}-", rest)
    for stand_in, color in COLORS.items():
        rest = rest.replace(stand_in, color)
    return f'{head} role="img">{rest}'
