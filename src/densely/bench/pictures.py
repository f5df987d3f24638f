"""The two pictures: bars of speed and memory, and memory against depth."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from densely.bench.depth import NOTE, DepthSeries
from densely.bench.nets import NETS
from densely.bench.results import Comparison, Measured
from densely.bench.tables import MODE_TITLES, megabytes, rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"ours": "#1f6fb4", "accelerated": "#7fb2dd", "peer": "#b8b8b8"}
KINDS = {"ours": "densely", "accelerated": "densely.accelerate", "peer": "others"}


def draw_bars(comparisons: Sequence[Comparison], path: Path, conditions: str) -> None:
    """A row of panels for each network: images a second in each mode, and megabytes kept."""
    nets = list(dict.fromkeys(comparison.net for comparison in comparisons))
    modes = list(dict.fromkeys(comparison.mode for comparison in comparisons))
    panels = [*modes, *(["kept"] if "train" in modes else [])]
    found = {(comparison.net, comparison.mode): comparison for comparison in comparisons}
    names = {net: _names([c for c in comparisons if c.net == net]) for net in nets}
    heights = [1.6 + len(names[net]) for net in nets]

    figure = _figure(3.2 + 3.6 * len(panels), 0.26 * sum(heights) + 0.5)
    grid = figure.subplots(
        len(nets), len(panels), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes_of_net, net in zip(grid, nets, strict=True):
        for axes, panel in zip(axes_of_net, panels, strict=True):
            comparison = found[net, "train" if panel == "kept" else panel]
            if panel == "kept":
                title = "kept for backward, MB/image"
                _bars(axes, comparison, names[net], _kept_mb, _kept_text(comparison))
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
    _save(figure, path)


def draw_depth(series: Sequence[DepthSeries], path: Path) -> None:
    """Kept bytes over those of the shallowest network, both axes logarithmic."""
    figure = _figure(7, 5.6)
    axes = figure.subplots()
    depths = series[0].depths
    for power, name in ((1, "linear"), (2, "quadratic")):
        ideal = [(depth / depths[0]) ** power for depth in depths]
        axes.loglog(depths, ideal, color="0.75", linewidth=0.8, zorder=0)
        axes.annotate(
            name, (depths[-1], ideal[-1]), xytext=(-4, 4), textcoords="offset points",
            fontsize=8, color="0.45", ha="right",
        )  # fmt: skip
    styles = ["o-", "s-", "^--", "v--", "D:", "P:"]
    for i, (line, style) in enumerate(zip(series, styles, strict=False)):
        if line.gap is not None:
            continue
        axes.loglog(
            depths,
            line.relative(),
            style,
            color=f"C{i}",
            markersize=5,
            linewidth=2.4 if line.name == "densely" else 1.2,
            label=f"{line.name}: L^{line.exponent:.2f} from "
            f"{megabytes(line.kept_bytes_per_image[0])} MB/image",
        )
    axes.set_xticks(depths, [str(depth) for depth in depths])
    ticks = [n for n in (1, 2, 4, 8, 16, 32) if n <= (depths[-1] / depths[0]) ** 2]
    axes.set_yticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("depth L (layers with weights)")
    axes.set_ylabel(f"kept for the backward pass, times that at L = {depths[0]}")
    axes.grid(alpha=0.3)
    # Below the lines, which leave no corner free.
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    axes.set_title(textwrap.fill(NOTE, 95), fontsize=8, loc="left")
    _save(figure, path)


def _names(comparisons: Sequence[Comparison]) -> list[str]:
    """Variants with figures in any of these, in their order."""
    rows = [row for comparison in comparisons for row in comparison.rows if row.gap is None]
    return list(dict.fromkeys(row.name for row in rows))


def _bars(
    axes: "Axes",
    comparison: Comparison,
    names: Sequence[str],
    value: Callable[[Measured], float | None],
    text: Callable[[Measured], str],
) -> None:
    rows = [comparison.find(name) for name in names]
    values = [value(row) or 0.0 for row in rows]
    axes.barh(range(len(rows)), values, color=[COLORS[row.kind] for row in rows], height=0.72)
    for i, row in enumerate(rows):
        label = text(row) if value(row) is not None else "not measured"
        axes.annotate(
            label, (values[i], i), xytext=(3, 0), textcoords="offset points", va="center",
            fontsize=7.5,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.32 * max([*values, 1e-9]))
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _kept_mb(row: Measured) -> float | None:
    return None if row.kept_bytes_per_image is None else row.kept_bytes_per_image / 1e6


def _kept_text(comparison: Comparison) -> Callable[[Measured], str]:
    def text(row: Measured) -> str:
        base = comparison.find(comparison.reference).kept_bytes_per_image
        kept = row.kept_bytes_per_image
        less = f" ({base / kept:.1f}x less)" if base and kept and base > 1.05 * kept else ""
        return f"{megabytes(kept)}{less}"

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


def _figure(width: float, height: float) -> "Figure":
    # Not pyplot: it keeps global state and would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    # Beside, then in its place: a picture that is being looked at is never half written.
    beside = path.with_name(path.name + ".new")
    figure.savefig(beside, format="png")
    beside.replace(path)
