"""Pictures of heat maps: the image, and beside it the map laid over the image.

Positive maps go from nothing by way of purple to yellow (inferno), signed ones from blue (speaks
against the class) by way of nothing to orange (speaks for it). The larger a value, the more of its
colour covers the image, which is grey and darkened below, so that only the map has colours. The
bar beside shows the colours as they come out over a middle grey.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps

# Not pyplot: it keeps global state and would look for a display.
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from densely import drawing
from densely.words import printable

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]

LARGEST = 2000  # an image whose longer side is above is scaled down: a picture is for the eye
SMALLEST = 256  # an image whose longer side is below is enlarged, by a whole number
TILE = 112  # longer side of an image in a contact sheet, about

#: Dark in the middle, as inferno is at its lower end: where the map is near zero.
_SIGNED = LinearSegmentedColormap.from_list(
    "against and for",
    ["#7cc4ff", "#2f84e6", "#1b4a8c", "#303030", "#a12f17", "#f0562b", "#ffb05c"],
)
_TITLE = 9.5  # points
_COLORS = 255  # of a scale; an odd number, so that one in the middle stands for 0
_COVER = 0.8  # share of the strongest colour: something of the image always shows
_BELOW = 0.65  # brightness of the image under the map
_UNSEEN = 0.25  # ... and where the network did not look


def overlay(pixels: Pixels | Tensor, heat_map: Tensor, *, title: str, signed: bool) -> Image.Image:
    """The image at its own resolution, the map over it, a bar of the map's values, and a title.

    Images smaller than `SMALLEST` are enlarged by a whole number: each pixel stays a square. Those
    larger than `LARGEST` are scaled down.

    Args:
        pixels: uint8 [C, H, W], of 1 or 3 channels.
        heat_map: [h, w] of any size, stretched bilinearly over the image; NaN where the network
            did not look, which darkens the image.
        title: any text.
        signed: whether the map has values below zero, which speak against the class.
    """
    image = _planes(shrunk(pixels, LARGEST))
    heat: Values = stretch(heat_map, *image.shape[:2]).numpy()
    limit = _limit(heat)
    factor = -(-SMALLEST // max(image.shape[:2]))
    panels = [_enlarged(panel, factor) for panel in (image, _blend(image, heat, limit, signed))]
    return _frame(panels, title, limit, signed)


def tile(
    pixels: Pixels | Tensor, heat_map: Values | Tensor | None, *, signed: bool = True
) -> Image.Image:
    """A small pair for a contact sheet: the image, and the map over it; no text.

    Both are about `TILE` pixels large: smaller images are enlarged by a whole number, larger ones
    are scaled down.

    Args:
        pixels: uint8 [C, H, W], of 1 or 3 channels.
        heat_map: as for `overlay`; None for the image alone.
        signed: as for `overlay`; class activation maps are.
    """
    image = _planes(shrunk(pixels, TILE))
    factor = max(1, round(TILE / max(image.shape[:2])))
    panels = [_enlarged(image, factor)]
    height, width = panels[0].shape[:2]
    if heat_map is None:
        return Image.fromarray(panels[0])
    heat: Values = stretch(torch.as_tensor(heat_map), *image.shape[:2]).numpy()
    panels.append(_enlarged(_blend(image, heat, _limit(heat), signed), factor))
    pair = Image.new("RGB", (2 * width + 2, height), "white")
    for i, panel in enumerate(panels):
        pair.paste(Image.fromarray(panel), (i * (width + 2), 0))
    return pair


def shrunk(pixels: Pixels | Tensor, largest: int) -> Pixels:
    """An image [C, H, W] scaled down to a longer side of `largest`, if it is above."""
    array: Pixels = np.asarray(pixels.cpu() if isinstance(pixels, Tensor) else pixels)
    height, width = array.shape[1:]
    longer = max(height, width)
    if longer <= largest:
        return array
    sides = (max(1, round(width * largest / longer)), max(1, round(height * largest / longer)))
    # Plane by plane: Pillow has four bytes a pixel for colours, and they would be copied twice.
    planes = [Image.fromarray(plane).resize(sides, Image.Resampling.LANCZOS) for plane in array]
    return np.stack([np.asarray(plane) for plane in planes])


def _planes(array: Pixels) -> Pixels:
    """[H, W, 3] for Pillow."""
    return np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0))


def stretch(heat_map: Tensor, height: int, width: int) -> Tensor:
    """A map [h, w] bilinearly at another size: float32 [height, width] on the CPU."""
    heat = heat_map.detach().float().cpu()
    if heat.shape == (height, width):
        return heat
    if width == 1 < height:  # which F.interpolate fills with what the first row comes to
        return stretch(heat.T, width, height).T
    smooths = heat.shape[0] > height or heat.shape[1] > width
    size = (height, width)
    return F.interpolate(heat[None, None], size, mode="bilinear", antialias=smooths)[0, 0]


def _limit(heat: Values) -> float:
    """The value of the strongest colour."""
    largest = float(np.abs(np.nan_to_num(heat)).max())
    return largest if largest > 0 else 1.0


def _enlarged(panel: Pixels, factor: int) -> Pixels:
    return panel.repeat(factor, axis=0).repeat(factor, axis=1) if factor > 1 else panel


def _blend(image: Pixels, heat: Values, limit: float, signed: bool) -> Pixels:
    """The map over the image: uint8 [H, W, 3]."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    unseen = np.isnan(heat)
    value = np.clip(np.nan_to_num(heat) / limit, -1 if signed else 0, 1)
    colors, cover = _scale(signed)
    if signed:
        value = (value + 1) / 2
    place = np.rint(value * (_COLORS - 1)).astype(np.intp)
    share = np.where(unseen, 0, cover[place])[..., None]
    base = (grey * np.where(unseen, _UNSEEN, _BELOW))[..., None]
    mixed: Pixels = np.rint(base * (1 - share) + colors[place] * share).astype(np.uint8)
    return mixed


def _scale(signed: bool) -> tuple[Values, Values]:
    """Colours [n, 3] from 0 to 255, and the share of the image that each covers [n]."""
    steps = np.linspace(-1 if signed else 0, 1, _COLORS)
    colors = (_SIGNED if signed else colormaps["inferno"])(np.linspace(0, 1, _COLORS))[:, :3]
    # Rises steeply at first: inferno begins black, and would darken more than it shows.
    cover = _COVER * np.abs(steps) ** (0.8 if signed else 0.6)
    return (255 * colors).astype(np.float32), cover.astype(np.float32)


def _frame(panels: Sequence[Pixels], title: str, limit: float, signed: bool) -> Image.Image:
    """Panels side by side, title above, bar to the right; text grows with the panels."""
    height, width = panels[0].shape[:2]
    # Beside panels that are high and narrow, text that grows with the height would dwarf them.
    unit = max(1.0, min(max(height, width), 4 * width) / 450)
    gap, bar_width, bar_height = (round(unit * n) for n in (12, 14, 110))
    bar_height = max(height, bar_height)
    bar_left = 2 * width + 3 * gap
    full_width = max(bar_left + bar_width + round(unit * 54), round(unit * 300))

    figure = Figure(dpi=100 * unit)
    canvas = FigureCanvasAgg(figure)
    with drawing.any_signs():
        text = figure.text(
            gap / full_width, 1, "", fontsize=_TITLE, family=drawing.families(), va="top",
            parse_math=False,
        )  # fmt: skip
        height_of_text = _fit(text, title, full_width - 2 * gap)
        top = 2 * gap + height_of_text
        full_height = top + bar_height + gap
        _resize(figure, full_width, full_height)
        text.set_y(1 - gap / full_height)
        axes = figure.add_axes(
            (
                bar_left / full_width, gap / full_height,
                bar_width / full_width, bar_height / full_height,
            )
        )  # fmt: skip
        _draw_bar(figure, axes, limit, signed)
        canvas.draw()  # type: ignore[no-untyped-call]
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
    for i, panel in enumerate(panels):  # after all else, so that each pixel stays what it is
        picture.paste(Image.fromarray(panel), (gap + i * (width + gap), top))
    return picture


def _fit(text: Text, title: str, width: int) -> int:
    """Give a text this title, in lines that fit into `width`; returns its height in pixels."""
    lines = [""]
    for word in printable(title).split():
        for piece in _pieces(text, word, width):
            longer = f"{lines[-1]} {piece}".lstrip()
            if lines[-1] and _width(text, longer) > width:
                lines.append(piece)
            else:
                lines[-1] = longer
    text.set_text("\n".join(lines))
    return math.ceil(text.get_window_extent().height)


def _pieces(text: Text, word: str, width: int) -> list[str]:
    """A word without a place to break, broken where it must be."""
    letters = len(word)
    while letters > 1 and _width(text, word[:letters]) > width:
        letters = letters * 9 // 10
    return [word[i : i + letters] for i in range(0, len(word), letters)]


def _width(text: Text, line: str) -> float:
    text.set_text(line)
    return float(text.get_window_extent().width)


def _draw_bar(figure: Figure, axes: Axes, limit: float, signed: bool) -> None:
    colors, cover = _scale(signed)
    shown = 128 * _BELOW * (1 - cover[:, None]) + colors * cover[:, None]
    norm = Normalize(-limit if signed else 0, limit)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(shown / 255)), cax=axes)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(6, symmetric=signed)
    bar.formatter = FuncFormatter(lambda value, _: f"{value:.3g}".replace("-", "−"))
    axes.tick_params(labelsize=8, length=2.5, color="0.5", labelcolor="0.25")


def _resize(figure: Figure, width: int, height: int) -> None:
    # A trifle more, since the canvas rounds down.
    figure.set_size_inches((width + 0.01) / figure.dpi, (height + 0.01) / figure.dpi)
