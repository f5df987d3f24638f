"""The picture of a run: its three curves over the epochs, as the chapter draws them."""

from collections.abc import Sequence
from pathlib import Path

from densely import drawing
from densely.training.run import EpochMetrics, held_out_split


def draw_curves(rows: Sequence[EpochMetrics], path: Path, title: str) -> None:
    """Draw train loss, train accuracy and held-out accuracy into a PNG.

    Colours and dashes are the chapter's, and the legend ends in the last values. Epochs that were
    not evaluated have no held-out accuracy. Losses above 2 are cut off.
    """
    from matplotlib.ticker import MaxNLocator

    held_out = held_out_split(rows)
    figure = drawing.new_figure(6, 4)
    axes = figure.subplots()
    for name, style, color, field in (
        ("train loss", "-", "C0", "train_loss"),
        ("train acc", "--", "m", "train_accuracy"),
        (f"{held_out} acc", "-.", "g", f"{held_out}_accuracy"),
    ):
        points = [(row.epoch, y) for row in rows if (y := getattr(row, field)) is not None]
        if not points:  # no epoch was evaluated yet
            continue
        epochs, values = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else None
        label = f"{name} {values[-1]:.3f}"
        axes.plot(epochs, values, style, color=color, marker=marker, label=label)
    axes.set_ylim(0, min(2.0, max(1.08, 1.05 * max(row.train_loss for row in rows))))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    drawing.anybodys([axes.set_title(title, fontsize=10)])  # it may hold a folder's name
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    drawing.save(figure, path)
