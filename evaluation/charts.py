"""Pictures of predictions, a small one a finding: ROC, precision and recall, reliability, confusion. As PNG."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from evaluation.metrics import known, reliability
from evaluation.plots import COLOURS

ACROSS = 5
GREY = "#b8bcc2"


def roc(scores: np.ndarray, labels: np.ndarray, findings: Sequence[str], called: np.ndarray) -> bytes:
    """ROC curves, with a dot where the threshold stands. scores, labels, called (bool): [n, F]."""

    def draw(axes: Any, s: np.ndarray, y: np.ndarray, c: np.ndarray) -> None:
        false, true, _ = roc_curve(y, s)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
        axes.plot(false, true, color=COLOURS[1])
        axes.plot([c[y == 0].mean()], [c[y == 1].mean()], "o", color=COLOURS[0], markersize=4)

    return _grid(scores, labels, findings, called, draw, "1 - specificity", "sensitivity")


def precision_recall(scores: np.ndarray, labels: np.ndarray, findings: Sequence[str], called: np.ndarray) -> bytes:
    """Precision (PPV) over recall (sensitivity), as steps; the dashed line is the share of positives, what chance reaches."""

    def draw(axes: Any, s: np.ndarray, y: np.ndarray, c: np.ndarray) -> None:
        precision, recall, _ = precision_recall_curve(y, s)
        axes.axhline(y.mean(), color=GREY, linewidth=0.8, linestyle="--")
        axes.step(recall, precision, where="post", color=COLOURS[1])
        if c.any():
            axes.plot([c[y == 1].mean()], [y[c].mean()], "o", color=COLOURS[0], markersize=4)

    return _grid(scores, labels, findings, called, draw, "recall (sensitivity)", "precision (PPV)")


def reliabilities(before: np.ndarray, after: np.ndarray, labels: np.ndarray, findings: Sequence[str]) -> bytes:
    """Observed share over mean probability, by bin, before (grey) and after calibration. before, after, labels: [n, F]."""

    def draw(axes: Any, s: np.ndarray, y: np.ndarray, raw: np.ndarray) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
        for values, colour in ((raw, COLOURS[2]), (s, COLOURS[0])):
            rows = [row for row in reliability(values, y) if row["n"]]
            axes.plot([r["mean_score"] for r in rows], [r["observed"] for r in rows], "o-", color=colour, markersize=2.5, linewidth=1)

    return _grid(after, labels, findings, before, draw, "mean probability", "observed share", both=False)


def confusions(scores: np.ndarray, labels: np.ndarray, findings: Sequence[str], called: np.ndarray) -> bytes:
    """Counts of called (columns) against labelled (rows), shaded by the share of their row."""

    def draw(axes: Any, s: np.ndarray, y: np.ndarray, c: np.ndarray) -> None:
        counts = np.array([[((y == label) & (c == call)).sum() for call in (0, 1)] for label in (0, 1)])
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=(0, 1, 1, 0))
        for row in (0, 1):
            for column in (0, 1):
                colour = "white" if shares[row, column] > 0.6 else "black"
                axes.text(column / 2 + 0.25, row / 2 + 0.25, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks([0.25, 0.75], ["no", "yes"])
        axes.set_yticks([0.25, 0.75], ["no", "yes"])
        axes.set_ylim(1, 0)

    return _grid(scores, labels, findings, called, draw, "called", "labelled", both=False)


def _grid(
    scores: np.ndarray,
    labels: np.ndarray,
    findings: Sequence[str],
    beside: np.ndarray,
    draw: Callable[[Any, np.ndarray, np.ndarray, np.ndarray], None],
    x: str,
    y: str,
    both: bool = True,
) -> bytes:
    """A square a finding; `draw` gets its known rows. both: it needs positives and negatives, or the square says that it has not."""
    from matplotlib.figure import Figure

    down = -(-len(findings) // ACROSS)
    figure = Figure(figsize=(2.1 * ACROSS, 2.15 * down + 0.4))
    squares = figure.subplots(down, ACROSS, sharex=True, sharey=True, squeeze=False)
    told = known(labels)
    for i, axes in enumerate(squares.flat):
        if i >= len(findings):
            axes.set_visible(False)
            continue
        rows = told[:, i]
        own = labels[rows, i]
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set_title(findings[i], fontsize=8)
        axes.tick_params(labelsize=7)
        if not len(own) or (both and len(np.unique(own)) < 2):
            axes.text(0.5, 0.5, "one class" if len(own) else "no labels", ha="center", va="center", fontsize=8, color="#57606c")
        else:
            draw(axes, scores[rows, i], own, beside[rows, i])
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    figure.tight_layout()
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()
