"""Pictures of judgements, as PNG."""

import io
from collections.abc import Mapping

import numpy as np

from evaluation.intervals import Interval

COLOURS = ("#c8553d", "#33658a", "#8a8d91", "#588157")


def dots(rows: Mapping[str, Mapping[str, Interval]], axis: str, reference: float | None = None) -> bytes:
    """A dot and its interval for each series of each row, the first row on top; undefined ones are left out.

    rows: {row: {series: Interval}}; reference: where a dashed line stands, such as 0.5 of AUROC.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(series for row in rows.values() for series in row))
    figure = Figure(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for k, (name, colour) in enumerate(zip(names, COLOURS)):
        found = [(i + (k - (len(names) - 1) / 2) * 0.22, row[name]) for i, row in enumerate(rows.values()) if name in row]
        found = [(y, one) for y, one in found if np.isfinite([one.value, one.low, one.high]).all()]
        heights, values = [y for y, _ in found], [one.value for _, one in found]
        axes.hlines(heights, [one.low for _, one in found], [one.high for _, one in found], color=colour, linewidth=1.6)
        axes.plot(values, heights, "o", color=colour, markersize=4.5, label=name)
    if reference is not None:
        axes.axvline(reference, color="#57606c", linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
