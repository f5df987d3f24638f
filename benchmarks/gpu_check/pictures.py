"""Pictures of what `correct` and `speed` have found, drawn from their rows."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densely import drawing
from densely.words import counted
from gpu_check.distance import FACTOR
from gpu_check.setting import in_a_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]

OURS, OTHERS, WRONG = "#1f6fb4", "#b8b8b8", "#c0392b"
DTYPES = {
    "fp32": ("float32", "#2a9d8f"),
    "fp16": ("float16", "#e9a23b"),
    "bf16": ("bfloat16", OURS),
}
#: Distances beyond these are drawn at the edge: exact zeros, and where the exact result is zero.
NEAREST, FURTHEST = 1e-8, 1.0


def draw(draw_rows: Callable[[Rows, Path, str], None], rows: Rows, path: Path, title: str) -> None:
    """Draw them, if matplotlib is here and there is anything to be drawn; never fails a stage."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{path.name} is not drawn: matplotlib is not installed")
        return
    try:
        draw_rows(rows, path, title)
    except Exception as error:
        print(f"{path.name} is not drawn: {in_a_line(error)}")


def draw_speed(rows: Rows, path: Path, title: str) -> None:
    """Bars of images a second, a panel for each net and mode; beside them ms and peak memory."""
    measured = [row for row in rows if "images_per_s" in row]
    panels = list(dict.fromkeys((row["net"], row["mode"]) for row in measured))
    if not panels:
        return
    groups = [[row for row in measured if (row["net"], row["mode"]) == p] for p in panels]
    heights = [0.9 + 0.26 * len(group) for group in groups]
    figure = drawing.new_figure(8, sum(heights) + 0.4)
    grid = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})
    for (axes,), (net, mode), group in zip(grid, panels, groups, strict=True):
        _bars(axes, sorted(group, key=lambda row: -row["images_per_s"]))
        axes.set_title(f"{net}, {mode}: images/s", fontsize=9, loc="left")
    figure.suptitle(title, fontsize=10, parse_math=False)
    drawing.save(figure, path)


def _bars(axes: "Axes", rows: Rows) -> None:
    speeds = [row["images_per_s"] for row in rows]
    colors = [OURS if row["ours"] else OTHERS for row in rows]
    drawing.bars(axes, [row["variant"] for row in rows], speeds, _texts(rows), colors, room=1.45)


def _texts(rows: Rows) -> list[str]:
    """Speed, time and peak memory."""
    peaks = [f", peak {row['peak_gb']:.2f} GB" if "peak_gb" in row else "" for row in rows]
    return [
        f"{row['images_per_s']:,.0f} ({row['step_ms']:.2f} ms{peak})"
        for row, peak in zip(rows, peaks, strict=True)
    ]


def draw_distances(rows: Rows, path: Path, title: str) -> None:
    """Each kind of result of each check: how far from float64 it is, over plain PyTorch's distance.

    What lies above the line is further than it may be, unless rounding alone is that far.
    """
    points = [
        (row["dtype"], kind["plain"], kind["fused"], kind["ok"])
        for row in rows
        for kind in row.get("kinds", {}).values()
        if kind["plain"] > 0  # not what is captured, beside the same launched
    ]
    if not points:
        return
    figure = drawing.new_figure(6.4, 6.2)
    axes = figure.subplots()
    ends = [NEAREST, FURTHEST]
    axes.loglog(ends, ends, color="0.75", linewidth=0.8, label="as far as plain PyTorch")
    axes.loglog(
        ends, [FACTOR * end for end in ends], color="0.3", linewidth=1, label=f"{FACTOR} times that"
    )
    for short, (name, color) in DTYPES.items():
        mine = [point for point in points if point[0] == short]
        for fine, marker in ((True, "o"), (False, "X")):
            chosen = [point for point in mine if point[3] is fine]
            if not chosen:
                continue
            x, y = ([_within(point[i]) for point in chosen] for i in (1, 2))
            count, where = counted(len(chosen), "result"), "within" if fine else "beyond"
            axes.scatter(
                x, y, s=14 if fine else 42, marker=marker, color=color if fine else WRONG,
                alpha=0.55 if fine else 1.0, linewidths=0, zorder=3,
                label=f"{name}: {count} {where} the bound",
            )  # fmt: skip
    axes.set_xlim(NEAREST / 1.5, FURTHEST * 1.5)
    axes.set_ylim(NEAREST / 1.5, FURTHEST * 1.5)
    axes.set_aspect("equal")
    axes.set_xlabel("plain PyTorch: distance from float64, as a share of the result")
    axes.set_ylabel("densely: the same")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", frameon=False)
    axes.set_title(title, fontsize=9, parse_math=False)
    drawing.save(figure, path)


def _within(distance: float) -> float:
    """At an edge where it is beyond that, or a NaN."""
    return min(max(distance, NEAREST), FURTHEST) if distance == distance else FURTHEST
