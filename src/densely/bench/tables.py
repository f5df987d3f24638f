"""What a person reads at the end: a table for each network and mode, and one for depth."""

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from densely.bench.depth import DepthSeries
from densely.bench.nets import NETS
from densely.bench.results import Comparison

MODE_TITLES = {"train": "training step", "inference": "inference"}
#: A table no narrower than this keeps its figures whole where standard output is a file.
WIDTH = 100


def comparison_table(comparison: Comparison) -> Table:
    """Speed and memory of all variants; gaps are named below the figures."""
    size = NETS[comparison.net].image_size
    table = _table(
        f"{comparison.net} at {size}x{size}, {MODE_TITLES[comparison.mode]}, "
        f"batch {comparison.batch}"
    )
    rows = [row for row in comparison.rows if row.gap is None]
    columns: dict[str, list[str]] = {
        "variant": [row.name for row in rows],
        "runs in": [f"{row.precision}, {row.memory_format.replace('_', '-')}" for row in rows],
        "images/s": [rate(row.median) for row in rows],
        f"ratio to\n{comparison.reference}": [_ratio(comparison.ratio(row)) for row in rows],
    }
    if comparison.mode == "train":
        columns["kept\nMB/image"] = [megabytes(row.kept_bytes_per_image) for row in rows]
    if any(row.peak_bytes is not None for row in rows):
        columns["peak\nMB"] = [megabytes(row.peak_bytes) for row in rows]
    for heading in columns:
        justify: Literal["left", "right"] = "left" if heading in ("variant", "runs in") else "right"
        # On a narrow terminal one column gives way, and no figure.
        table.add_column(heading, justify=justify, no_wrap=heading != "runs in")
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row(*cells, style=_style(row.kind))
    remarks = [
        *(f"not measured: {row.name}: {row.gap}" for row in comparison.rows if row.gap is not None),
        *(f"{row.name}: {note}" for row in rows for note in row.notes),
    ]
    table.caption = Text("\n".join(remarks))
    return table


def depth_table(series: Sequence[DepthSeries], note: str) -> Table:
    """What the shallowest network keeps, how many times that the deeper ones, and the exponent."""
    first, *deeper = series[0].depths
    table = _table("kept for the backward pass against depth L")
    table.add_column("variant", no_wrap=True)
    table.add_column(f"L = {first}\nMB/image", justify="right")
    for depth in deeper:
        table.add_column(f"L = {depth}\ntimes that", justify="right")
    table.add_column("grows as", justify="right")
    for line in series:
        if line.gap is None:
            kept = megabytes(line.kept_bytes_per_image[0])
            times = [f"{value:.2f}" for value in line.relative()[1:]]
            table.add_row(
                line.name, kept, *times, f"L^{line.exponent:.2f}", style=_style(line.kind)
            )
    gaps = [f"not measured: {line.name}: {line.gap}" for line in series if line.gap is not None]
    table.caption = Text("\n".join([note, *gaps]))
    return table


def megabytes(count: int | None) -> str:
    """Three digits that count, in units of 10^6 bytes."""
    if count is None:
        return "-"
    return f"{count / 1e6:.{0 if count >= 1e8 else 1 if count >= 1e7 else 2}f}"


def rate(value: float | None) -> str:
    """Images a second, three digits that count."""
    if value is None:
        return "-"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )


def _style(kind: str) -> str:
    return {"ours": "bold cyan", "accelerated": "cyan"}.get(kind, "")
