"""The picture of a comparison: curves of all groups, and their accuracies with intervals."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from densely import drawing
from densely.comparison.compare import Comparison, Group
from densely.training.run import held_out_split


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw into a PNG: held-out accuracy and training loss over the epochs, accuracy at the end.

    Held-out accuracy is left out where some runs were judged on a validation split after each
    epoch and others on the test split. A line below says so, and what lines and shades are, where
    a group has several runs.
    """
    from matplotlib.ticker import MaxNLocator

    curves = [("training loss", "train_loss")]
    splits = {held_out_split(rows) for group in comparison.groups for rows in group.curves}
    if len(splits) == 1:
        curves.insert(0, ("held-out accuracy", f"{splits.pop()}_accuracy"))
    figure = drawing.new_figure(11, 3.8)
    *panels, end = figure.subplots(1, len(curves) + 1, width_ratios=[1.2, 1, 1][-len(curves) - 1 :])
    for i, group in enumerate(comparison.groups):
        for axes, (_, column) in zip(panels, curves, strict=True):
            values = _curves(group, column)
            judged = ~np.isnan(values).any(axis=0)
            epochs, values = 1 + np.flatnonzero(judged), values[:, judged]
            marker = "o" if len(epochs) == 1 else None
            axes.plot(epochs, values.mean(axis=0), color=f"C{i}", marker=marker)
            axes.fill_between(
                epochs, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.2
            )
        place = len(comparison.groups) - 1 - i  # the first one on top
        end.errorbar(
            group.accuracy.value,
            place,
            xerr=[
                [group.accuracy.value - group.accuracy.low],
                [group.accuracy.high - group.accuracy.value],
            ],
            fmt="o",
            color=f"C{i}",
            capsize=4,
        )
        end.scatter(
            group.accuracies, [place - 0.15] * len(group.accuracies), s=12, color=f"C{i}", alpha=0.6
        )
    for axes, (label, _) in zip(panels, curves, strict=True):
        axes.set_xlabel("epoch")
        axes.set_title(label, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    at = "lower right" if len(panels) > 1 else "upper right"  # where curves seldom are
    # By name: labels of lines that begin with _ are matplotlib's own.
    names = [group.name for group in comparison.groups]
    legend = panels[0].legend(panels[0].get_lines(), names, loc=at, fontsize=8)
    end.set_yticks(
        range(len(comparison.groups)), [group.name for group in reversed(comparison.groups)]
    )
    end.tick_params(axis="y", labelsize=8)
    end.set_ylim(-0.5, len(comparison.groups) - 0.5)
    end.set_title("accuracy in the end, 95% interval", fontsize=10)
    end.grid(alpha=0.3)
    told = []
    if any(len(group.runs) > 1 for group in comparison.groups):
        told = ["lines: mean over the runs", "shades: from the lowest to the highest"]
        told.append("small dots: runs")
    if len(panels) == 1:
        told.append("held-out accuracy is of different splits, and not drawn")
    if told:
        figure.supxlabel("; ".join(told), fontsize=8, color="0.35")
    title = figure.suptitle(f"{comparison.title}, on {comparison.data}", fontsize=11)
    drawing.anybodys([title, *legend.get_texts(), *end.get_yticklabels()])
    drawing.save(figure, path)


def _curves(group: Group, column: str) -> NDArray[np.float64]:
    """[runs, epochs], up to the shortest run; NaN where an epoch was not evaluated."""
    length = min(len(rows) for rows in group.curves)
    return np.array(
        [[getattr(row, column) for row in rows[:length]] for rows in group.curves], dtype=float
    )
