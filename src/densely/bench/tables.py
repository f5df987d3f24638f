"""What a person reads at the end: a table for each network and mode, and one for depth."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from densely.bench.depth import DepthSeries
from densely.bench.nets import NETS
from densely.bench.results import Comparison, Measured

MODE_TITLES = {"train": "training step", "inference": "inference"}
#: A table no narrower than this keeps its figures whole where standard output is a file.
WIDTH = 100


def comparison_table(comparison: Comparison, conditions: str) -> Table:
    """Speed and memory of all variants; gaps are named below the figures.

    Args:
        comparison: what was measured.
        conditions: device, threads and allocator, for the title.
    """
    trains = comparison.mode == "train"
    table = _table(
        f"{comparison.net} at {NETS[comparison.net].image_size}x{NETS[comparison.net].image_size}, "
        f"{MODE_TITLES[comparison.mode]}, batch {comparison.batch} ({conditions})"
    )
    table.add_column("variant", no_wrap=True)
    table.add_column("runs in", no_wrap=True)
    headings = ["images/s", f"x {comparison.reference}"]
    headings += ["kept MB/image"] if trains else []
    for heading in [*headings, "peak MB"]:
        table.add_column(heading, justify="right")
    for row in comparison.rows:
        if row.gap is None:
            table.add_row(*_cells(comparison, row, trains), style=_style(row.kind))
    gaps = [f"{row.name}: {row.gap}" for row in comparison.rows if row.gap is not None]
    notes = [f"{row.name}: {note}" for row in comparison.rows for note in row.notes]
    table.caption = Text("\n".join(["not measured", *gaps] if gaps else []) + "\n".join(notes))
    return table


def depth_table(series: Sequence[DepthSeries], note: str) -> Table:
    """Kept bytes over those of the shallowest network, and the exponents."""
    depths = series[0].depths
    table = _table(f"kept for the backward pass, over that of L = {depths[0]}")
    table.add_column("variant", no_wrap=True)
    table.add_column(f"MB/image at L = {depths[0]}", justify="right")
    for depth in depths[1:]:
        table.add_column(f"L = {depth}", justify="right")
    table.add_column("grows as", justify="right")
    for line in series:
        if line.gap is None:
            growth = [f"x {value:.2f}" for value in line.relative()[1:]]
            table.add_row(
                line.name,
                megabytes(line.kept_bytes_per_image[0]),
                *growth,
                f"L^{line.exponent:.2f}",
                style=_style(line.kind),
            )
    gaps = [f"not measured: {line.name}: {line.gap}" for line in series if line.gap is not None]
    table.caption = Text("\n".join([note, *gaps]))
    return table


def megabytes(count: int | None) -> str:
    """Three digits that count, in units of 10^6 bytes."""
    if count is None:
        return "-"
    return f"{count / 1e6:.{0 if count >= 1e8 else 1 if count >= 1e7 else 2}f}"


def rate(value: float) -> str:
    """Images a second, three digits that count."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _cells(comparison: Comparison, row: Measured, trains: bool) -> list[str]:
    ratio = comparison.ratio(row)
    cells = [
        row.name,
        f"{row.precision}, {row.memory_format.replace('_', '-')}",
        "-" if row.median is None else rate(row.median),
        "-" if ratio is None else f"{ratio:.2f}",
    ]
    return [*cells, *([megabytes(row.kept_bytes_per_image)] if trains else []),
            megabytes(row.peak_bytes)]  # fmt: skip


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def _style(kind: str) -> str:
    return {"ours": "bold cyan", "accelerated": "cyan"}.get(kind, "")
