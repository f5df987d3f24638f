"""How pictures are made: matplotlib without a display, any text in any script, whole files.

Not pyplot: it keeps global state and would look for a display.
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from densely.whole_file import whole_file
from densely.words import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

#: Families with signs beyond the Latin ones on the usual systems; those that are not installed
#: are left out, as each would be complained about.
_FAMILIES = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Heiti TC",
    "Microsoft YaHei", "SimHei", "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip


def new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> "Figure":
    """An empty figure of `width` x `height` inches, 150 pixels each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def bars(
    axes: "Axes",
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    colors: Sequence[str],
    room: float,
) -> None:
    """Horizontal bars, the first on top, each with its name before it and a text behind.

    The axis is `room` times as long as the longest bar.
    """
    axes.barh(range(len(names)), values, color=colors, height=0.72)
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.annotate(
            text, (value, i), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, room * max([*values, 1e-9]))
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def anybodys(texts: "Iterable[Text]") -> None:
    """Let texts hold what people call their classes and folders: dollars, Chinese, any bytes."""
    for text in texts:
        text.set_text(printable(text.get_text()))
        text.set_parse_math(False)
        text.set_fontfamily(families())


@cache
def families() -> list[str]:
    """Fonts for text of any language, as far as they are installed."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return [family for family in _FAMILIES if family in installed]


@contextmanager
def any_signs() -> Iterator[None]:
    """A context in which text may have signs that no font here has: a box stands for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def png(figure: "Figure", metadata: dict[str, str] | None = None) -> bytes:
    """The figure as a PNG, with texts by key that no picture shows."""
    data = io.BytesIO()
    with any_signs():
        figure.savefig(data, format="png", metadata=metadata)
    return data.getvalue()


def save(figure: "Figure", path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the figure as a PNG, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_bytes(png(figure, metadata))
