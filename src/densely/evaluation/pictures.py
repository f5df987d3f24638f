"""The pictures of a report, as PNG bytes.

Two colours throughout, which the colour-blind tell apart as well: blue for what is right or
promised and kept, orange for what is wrong or missing.
"""

import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps

# Not pyplot: it keeps global state and would look for a display.
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, PowerNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from densely import drawing
from densely.evaluation.findings import CalibrationScore, ClassScore, RiskCoverage, Scores

BLUE, ORANGE, GREY = "#1f6fb4", "#d9730d", "#6b7280"
#: Up to here a confusion matrix has counts in its cells, and names on its axes.
CLASSES_WITH_COUNTS, CLASSES_WITH_NAMES = 20, 60
#: As many cells in a row have a pixel each at least; of more, neighbours are mixed.
CELLS_DRAWN = 1000
#: As many classes are drawn; of more, the worst.
CLASSES_DRAWN = 40
#: Longer names are cut off.
NAME_LENGTH = 24
MARKERS = "osD^vP*X"


def confusion_picture(scores: Scores) -> bytes:
    """The confusion matrix: a row a true class, a column a class given.

    The colour of a cell is its share of the row's images: blue on the diagonal, orange beside it.
    The scale is that of a square root, so that rare confusions are seen.

    Raises:
        ValueError: there is no matrix, for images with several labels.
    """
    counts = scores.confusion
    if counts is None:
        raise ValueError("no confusion matrix for images with several labels")
    classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    norm = PowerNorm(0.5, 0, 1)
    right, wrong = _scale("right", BLUE), _scale("wrong", ORANGE)
    diagonal = np.eye(classes, dtype=bool)
    colors = np.where(diagonal[..., None], right(norm(shares)), wrong(norm(shares)))

    inches = min(max(0.5 * classes, 3.2), 7.5)
    is_named = classes <= CLASSES_WITH_NAMES
    # Beside the cells: names, or numbers only.
    width, height = (2.6, 1.4) if is_named else (2, 0.6)
    figure = drawing.new_figure(inches + width, inches + height, layout="compressed")
    axes = figure.subplots()
    axes.imshow(colors, interpolation="nearest" if classes <= CELLS_DRAWN else "antialiased")
    axes.set_xlabel("class given")
    axes.set_ylabel("true class")
    if is_named:
        _name_axes(axes, scores.classes)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_xlabel("class given, by its number in the table")
        axes.set_ylabel("true class, by its number in the table")
    if classes <= CLASSES_WITH_COUNTS:
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
        _write_counts(axes, counts, norm(shares))
    for name, colormap in (("wrong", wrong), ("right", right)):
        bar = figure.colorbar(
            ScalarMappable(norm, colormap), ax=axes, fraction=0.03, pad=0.03, aspect=30,
            ticks=[0, 0.01, 0.05, 0.2, 0.5, 1], format=PercentFormatter(1, decimals=0),
        )  # fmt: skip
        bar.ax.set_title(name, fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.ax.minorticks_off()
    return drawing.png(figure)


def reliability_picture(before: CalibrationScore, after: CalibrationScore | None) -> bytes:
    """Accuracy against confidence, bin by bin, before and after calibration.

    Bars reach up to the share that is right; the gap to the mean confidence is hatched, above a
    bar where the network is too sure, and over it where it is too modest. Below: how many images
    there are of each confidence. `after` is None where nothing calibrates the probabilities.
    """
    scores = [before] if after is None else [before, after]
    figure = drawing.new_figure(4.6 * len(scores) + 0.4, 5.2)
    grid = figure.subplots(2, len(scores), squeeze=False, height_ratios=[3.2, 1], sharex=True)
    for (upper, lower), score in zip(grid.T, scores, strict=True):
        bins = [b for b in score.bins if b.images]
        left = [b.low for b in bins]
        width = [b.high - b.low for b in bins]
        upper.plot(
            [0, 1], [0, 1], "--", color=GREY, linewidth=1, zorder=3, label="as sure as right"
        )
        upper.bar(
            left, [b.accuracy for b in bins], width, align="edge", color=BLUE, alpha=0.55,
            edgecolor="white", label="share that is right",
        )  # fmt: skip
        upper.bar(
            left, [b.confidence - b.accuracy for b in bins], width, [b.accuracy for b in bins],
            align="edge", facecolor="none", edgecolor=ORANGE, hatch="///",
            label="gap to the confidence",
        )  # fmt: skip
        upper.set_ylim(0, 1)
        upper.set_xlim(0, 1)
        title = f"after calibration: {score.method}" if score is after else "before calibration"
        if after is None:
            title = "not calibrated"
        upper.set_title(f"{title}, ECE {score.ece:.2%}", fontsize=10)
        images = max(sum(b.images for b in bins), 1)
        lower.bar(
            left, [b.images / images for b in bins], width, align="edge", color=GREY,
            edgecolor="white",
        )  # fmt: skip
        lower.set_xlabel("confidence")
        for axes in (upper, lower):
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            _calm(axes)
    grid[0, 0].set_ylabel("right")
    grid[0, 0].legend(loc="upper left", fontsize=8, frameon=False)
    grid[1, 0].set_ylabel("images")
    top = max(axes.get_ylim()[1] for axes in grid[1])
    for axes in grid[1]:
        axes.set_ylim(0, top)
    return drawing.png(figure)


def risk_coverage_picture(risk_coverage: RiskCoverage) -> bytes:
    """Share of wrong answers against the share of images that get one; chosen points are marked."""
    coverage, risk = np.array(risk_coverage.coverage), np.array(risk_coverage.risk)
    points = [
        (c.coverage, c.error, f"{100 * c.wanted_error:.3g}% wrong wanted: {100 * c.threshold:.4g}%")
        for c in risk_coverage.choices
        if c.threshold is not None and c.error is not None
    ]

    figure = drawing.new_figure(7.2, 4.2)
    axes = figure.subplots()
    axes.plot(coverage, risk, color=BLUE, linewidth=1.8)
    axes.fill_between(coverage, risk, color=BLUE, alpha=0.1, linewidth=0)
    for (x, y, label), marker in zip(points, itertools.cycle(MARKERS)):
        axes.plot(
            x, y, marker, color=ORANGE, ms=7, markeredgecolor="white", clip_on=False, zorder=3,
            label=label,
        )  # fmt: skip
    # A mistake among the very surest makes a spike; the scale is that of the rest.
    rest = [*risk[coverage >= 0.1], *(error for _, error, _ in points)]
    axes.set_ylim(0, 1.15 * max(rest, default=0) or 0.01)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the images that get an answer, the surest first")
    axes.set_ylabel("share of wrong answers")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"mean risk (AURC) {risk_coverage.area:.4f}", fontsize=10)
    _calm(axes)
    if points:
        axes.legend(
            loc="upper left", fontsize=8, frameon=False, title="answer from this confidence on"
        )
    return drawing.png(figure)


def class_picture(scores: Scores) -> bytes:
    """Precision and recall of each class that occurs, lowest F1 first; of many, the worst."""
    occurring = [
        (score.f1, score.precision, score.recall, score.name)
        for score in scores.classes
        if score.f1 is not None and score.precision is not None and score.recall is not None
    ]
    drawn = sorted(occurring, key=lambda row: row[0])[:CLASSES_DRAWN]
    places = range(len(drawn))
    precision, recall = [row[1] for row in drawn], [row[2] for row in drawn]

    figure = drawing.new_figure(7.2, 1.3 + 0.24 * max(len(drawn), 2))
    axes = figure.subplots()
    axes.hlines(
        places, np.minimum(precision, recall), np.maximum(precision, recall), color="0.75",
        linewidth=2, zorder=1,
    )  # fmt: skip
    axes.plot(
        precision, places, "D", color=ORANGE, markersize=5.5, label="precision", clip_on=False
    )
    axes.plot(recall, places, "o", color=BLUE, markersize=6, label="recall", clip_on=False)
    axes.set_yticks(places, [_short(name) for *_, name in drawn], fontsize=8)
    drawing.anybodys(axes.get_yticklabels())
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    lowest = min([*precision, *recall], default=0.0)
    axes.set_xlim(max(np.floor(lowest * 10 - 0.5) / 10, 0), 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    number = f"{len(drawn)} worst of {len(occurring)}" if len(drawn) < len(occurring) else "all"
    axes.set_title(f"{number} classes, lowest F1 first", fontsize=10)
    _calm(axes)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return drawing.png(figure)


def _write_counts(axes: Axes, counts: NDArray[np.int64], shades: NDArray[np.float64]) -> None:
    """Counts in the cells, those of zero left out; `shades` from 0 to 1 say how dark a cell is."""
    largest = len(f"{counts.max()}")
    size = min(9.0, 30 / max(largest, 2), 130 / len(counts))
    for row, column in zip(*np.nonzero(counts), strict=True):
        axes.text(
            column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=size,
            color="white" if shades[row, column] > 0.6 else "0.15",
        )  # fmt: skip


def _name_axes(axes: Axes, classes: Sequence[ClassScore]) -> None:
    names = [_short(score.name) for score in classes]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    if len(names) <= CLASSES_WITH_COUNTS:
        axes.tick_params(labelsize=9)
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.tick_params(labelsize=6)
        axes.tick_params(axis="x", labelrotation=90)
    drawing.anybodys(axes.get_xticklabels())
    drawing.anybodys(axes.get_yticklabels())


def _short(name: str) -> str:
    """One line of at most `NAME_LENGTH` letters, of which a Chinese sign takes two."""
    line = " ".join(name.encode("utf-8", "replace").decode().split())
    widths = [2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in line]
    if sum(widths) <= NAME_LENGTH:
        return line
    fitting = sum(total < NAME_LENGTH for total in itertools.accumulate(widths))
    return line[:fitting] + "…"


def _scale(name: str, color: str) -> Colormap:
    """From nearly white through `color` to a dark shade of it."""
    if name == "right":
        return colormaps["Blues"]
    return LinearSegmentedColormap.from_list(name, ["#fffaf5", "#fdd9b5", color, "#7a3d00"])


def _calm(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
