"""How pictures are made: matplotlib without a display, any text in any script, whole files.

Not pyplot: it keeps global state and would look for a display.
"""

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

#: Families with Chinese, Japanese or Korean signs on the usual systems.
_CJK_FAMILIES = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
    "PingFang SC", "Hiragino Sans GB", "Heiti TC", "Arial Unicode MS",
    "Microsoft YaHei", "SimHei", "Malgun Gothic", "WenQuanYi Zen Hei", "Droid Sans Fallback",
)  # fmt: skip


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of `width` x `height` inches, 150 pixels each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def anybodys(texts: "Iterable[Text]") -> None:
    """Let texts hold what people call their classes and folders: dollars, Chinese, anything."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    families = ["DejaVu Sans", *(name for name in _CJK_FAMILIES if name in installed)]
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(families)


def png(figure: "Figure", *, tight: bool = False) -> bytes:
    """The figure as a PNG; `tight` cuts off what is empty around it.

    Signs that no installed font has become boxes, without a warning.
    """
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(data, format="png", bbox_inches="tight" if tight else None)
    return data.getvalue()


def save(figure: "Figure", path: Path) -> None:
    """Write the figure beside `path`, then in its place: nobody sees half a picture."""
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(png(figure))
    beside.replace(path)
