"""What was mined, as a table to print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vembed_ds.mining.contents import Contents, IntArray
from vembed_ds.mining.rules import NAMES, Rules
from vembed_ds.mining.run import FloatArray, Mined

QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
MEANINGS = {
    "margin": "closer than the positive - margin",
    "relative_margin": "closer than the positive - its share",
    "max_score": "above max_score",
    "min_score": "below min_score",
    "guide_margin": "the guide takes them for answers",
    "range_min": "among the first range_min that are left",
}


def kept_counts(contents: Contents, mined: Mined) -> IntArray:
    """``[R]``: how many negatives each record has."""
    counts: IntArray = (mined.negatives >= 0).sum(axis=1)[contents.query_of]
    return counts


def summarize(contents: Contents, mined: Mined, *, rules: Rules, dropped_records: bool) -> str:
    """The table.

    Args:
        contents: Of the data.
        mined: What was found.
        rules: That were applied.
        dropped_records: Whether records with too few negatives were left out.
    """
    counts = kept_counts(contents, mined)
    few = int((counts < rules.num_negatives).sum())
    kept = counts[counts >= rules.num_negatives] if dropped_records else counts
    fate = (
        "left out" if dropped_records else f"kept, {int((counts == 0).sum()):,} of them with none"
    )
    rows = {
        "records": f"{len(counts):,} ({len(contents.queries):,} distinct queries, "
        f"{len(contents.documents):,} distinct documents)",
        "written": f"{len(kept):,} records with {int(kept.sum()):,} negatives",
        f"fewer than {rules.num_negatives} negatives": f"{few:,} records, {fate}",
        "candidates": f"{int(mined.candidates.sum()):,} of the distinct queries",
        **dict(_dropped(mined, rules)),
        "rules": rules.described(),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {text}" for name, text in rows.items()]
    similarities = {
        "positives": mined.positive_scores,
        "negatives": mined.scores[mined.negatives >= 0],
    }
    return "\n".join([*lines, "", *_quantiles(similarities)])


def _dropped(mined: Mined, rules: Rules) -> Iterator[tuple[str, str]]:
    total = int(mined.candidates.sum())
    for name, number in zip(NAMES, mined.dropped.sum(axis=0).tolist(), strict=True):
        if number or getattr(rules, name):
            share = f" ({100 * number / total:.1f} %)" if total else ""
            yield f"  dropped: {name}", f"{number:,}{share}: {MEANINGS[name]}"


def _quantiles(similarities: Mapping[str, FloatArray]) -> Iterator[str]:
    yield f"{'similarity':<12}{'count':>12}{'mean':>9}" + "".join(f"{q:>9}" for q in QUANTILES)
    for name, values in similarities.items():
        if not len(values):
            yield f"{name:<12}{0:>12}"
            continue
        found = [float(values.mean()), *np.quantile(values, list(QUANTILES.values()))]
        yield f"{name:<12}{len(values):>12,}" + "".join(f"{value:>9.4f}" for value in found)
