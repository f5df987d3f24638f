"""The two pictures: bars of speed and memory, and memory against depth."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from densely import drawing
from densely.bench.depth import NOTE, DepthSeries
from densely.bench.nets import NETS
from densely.bench.results import Comparison, Measured
from densely.bench.tables import MODE_TITLES, megabytes, rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"ours": "#1f6fb4", "accelerated": "#7fb2dd", "peer": "#b8b8b8"}
#: Panels of memory in training, by the field of a row that they show.
MEMORY = {
    "kept_bytes_per_image": "kept for backward, MB/image",
    "peak_bytes": "peak memory in training, MB, batch {batch}",
}
KINDS = {"ours": "densely", "accelerated": "densely.accelerate", "peer": "others"}


def draw_bars(comparisons: Sequence[Comparison], path: Path, conditions: str) -> None:
    """A row of panels for each network: images a second in each mode, and memory in training."""
    nets = list(dict.fromkeys(comparison.net for comparison in comparisons))
    found = {(comparison.net, comparison.mode): comparison for comparison in comparisons}
    modes = list(dict.fromkeys(comparison.mode for comparison in comparisons))
    trained = [row for c in comparisons if c.mode == "train" for row in c.rows]
    memory = [panel for panel in MEMORY if any(getattr(row, panel) is not None for row in trained)]
    panels = [*modes, *memory]
    names = {net: _names([c for c in comparisons if c.net == net]) for net in nets}
    heights = [1.6 + len(names[net]) for net in nets]

    figure = drawing.new_figure(3.4 + 3.3 * len(panels), 0.26 * sum(heights) + 0.5)
    grid = figure.subplots(
        len(nets), len(panels), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes_of_net, net in zip(grid, nets, strict=True):
        for axes, panel in zip(axes_of_net, panels, strict=True):
            comparison = found[net, "train" if panel in MEMORY else panel]
            if panel in MEMORY:
                title = MEMORY[panel].format(batch=comparison.batch)
                _bars(axes, comparison, names[net], _megabytes(panel), _less(comparison, panel))
            else:
                title = f"{MODE_TITLES[panel]}, images/s, batch {comparison.batch}"
                _bars(axes, comparison, names[net], _rate, _rate_text(comparison))
            axes.set_title(title, fontsize=9)
            if axes is not axes_of_net[0]:
                axes.set_yticklabels([])
        size = NETS[net].image_size
        axes_of_net[0].set_ylabel(f"{net}\n{size}x{size}", fontsize=10, fontweight="bold")
    _legend_of_kinds(figure, comparisons)
    references = " and ".join(dict.fromkeys(c.reference for c in comparisons))
    figure.suptitle(
        f"densely bench ({conditions}); ratios to {references}", fontsize=10, parse_math=False
    )
    drawing.save(figure, path)


def draw_depth(series: Sequence[DepthSeries], path: Path) -> None:
    """Bytes kept for the backward pass against depth, both axes logarithmic."""
    lines = [line for line in series if line.gap is None]
    figure = drawing.new_figure(7, 5.8)
    axes = figure.subplots()
    depths = series[0].depths
    # A straight line of slope 1 or 2 from where the ordinary network begins: which way is it going?
    start = max(line.kept_bytes_per_image[0] for line in lines) / 1e6
    for power, name in ((1, "linear"), (2, "quadratic")):
        ideal = [start * (depth / depths[0]) ** power for depth in depths]
        axes.loglog(depths, ideal, color="0.8", linewidth=0.8, zorder=0)
        axes.annotate(
            name, (depths[-1], ideal[-1]), xytext=(-4, 3), textcoords="offset points",
            fontsize=8, color="0.45", ha="right", va="bottom",
        )  # fmt: skip
    for i, line in enumerate(lines):
        ours = line.kind == "ours"
        axes.loglog(
            depths,
            [kept / 1e6 for kept in line.kept_bytes_per_image],
            f"{'os^vDP'[i % 6]}{'-' if ours else '--'}",
            color=COLORS["ours"] if line.name == "densely" else f"C{i}",
            markersize=5,
            linewidth=2.4 if line.name == "densely" else 1.2,
            zorder=3 if ours else 2,
            label=f"{line.name}: {megabytes(line.kept_bytes_per_image[-1])} MB at L = "
            f"{depths[-1]}, grows as L^{line.exponent:.2f}",
        )
    axes.set_xticks(depths, [str(depth) for depth in depths])
    low, high = axes.get_ylim()
    ticks = [n * 10**k for k in range(-2, 5) for n in (1, 2, 5) if low <= n * 10**k <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("depth L (layers with weights)")
    axes.set_ylabel("kept for the backward pass, MB/image")
    axes.grid(alpha=0.3)
    # Below the lines, which leave no corner free; in the order in which they end.
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(lines)), key=lambda i: -lines[i].kept_bytes_per_image[-1])
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order],
        loc="outside lower center", ncols=1, fontsize=8, frameon=False,
    )  # fmt: skip
    axes.set_title(textwrap.fill(NOTE, 95), fontsize=8, loc="left")
    drawing.save(figure, path)


def _names(comparisons: Sequence[Comparison]) -> list[str]:
    """Variants with figures in any of these, in their order."""
    rows = [row for comparison in comparisons for row in comparison.rows if row.gap is None]
    return list(dict.fromkeys(row.name for row in rows))


def _label(row: Measured) -> str:
    """The name, and the precision where the name does not tell it."""
    short = row.precision == "bfloat16" and "bf16" not in row.name
    return f"{row.name}, bf16" if short else row.name


def _bars(
    axes: "Axes",
    comparison: Comparison,
    names: Sequence[str],
    value: Callable[[Measured], float | None],
    text: Callable[[Measured], str],
) -> None:
    rows = [comparison.find(name) for name in names]
    texts = [text(row) if value(row) is not None else "not measured" for row in rows]
    colors = [COLORS[row.kind] for row in rows]
    labels, values = [_label(row) for row in rows], [value(row) or 0.0 for row in rows]
    drawing.bars(axes, labels, values, texts, colors, room=1.32)


def _megabytes(panel: str) -> Callable[[Measured], float | None]:
    def value(row: Measured) -> float | None:
        count = getattr(row, panel)
        return None if count is None else count / 1e6

    return value


def _less(comparison: Comparison, panel: str) -> Callable[[Measured], str]:
    """Megabytes, and how many times less than the reference's."""

    def text(row: Measured) -> str:
        base = getattr(comparison.find(comparison.reference), panel)
        this = getattr(row, panel)
        less = f" ({base / this:.1f}x less)" if base and this and base > 1.05 * this else ""
        return f"{megabytes(this)}{less}"

    return text


def _rate(row: Measured) -> float | None:
    return row.median


def _rate_text(comparison: Comparison) -> Callable[[Measured], str]:
    def text(row: Measured) -> str:
        ratio = comparison.ratio(row)
        shown = "" if ratio is None else f" ({ratio:.2f}x)"
        return f"{rate(row.median)}{shown}"

    return text


def _legend_of_kinds(figure: "Figure", comparisons: Sequence[Comparison]) -> None:
    from matplotlib.patches import Patch

    seen = {row.kind for comparison in comparisons for row in comparison.rows if row.gap is None}
    handles = [Patch(color=COLORS[kind], label=KINDS[kind]) for kind in COLORS if kind in seen]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=8)
