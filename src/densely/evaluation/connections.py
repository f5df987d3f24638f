"""How much each layer of a dense block reads of each earlier one: figure 5 of the paper.

In a trained DenseNet even late layers use early features, and a transition uses all layers'.

Source: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks" (CVPR
2017), section 5, "Feature Reuse", figure 5.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn

from densely import drawing
from densely.evaluation.anatomy import Block, blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Matrix = NDArray[np.float64]


def connections(model: nn.Module) -> list[Matrix]:
    """Strength of the connections within each dense block.

    The strength of a connection is the mean absolute weight that its reader's first convolution
    has for the channels that come from its source: their L1 norm, divided by the number of weights,
    as sources have different numbers of channels.

    Args:
        model: a DenseNet of densely, torchvision, timm or MONAI, accelerated or not.

    Returns:
        For each block of L layers float64 [L + 1, L + 1]. Row s is a source: 0 the block's input,
        else layer s. Column t - 1 is a reader: layer t, and in the last column the transition
        that follows the block, or the classifier. NaN where there is no connection (t <= s).

    Raises:
        ConfigError: another network, or a ResNet, which adds where DenseNets concatenate.
    """
    return [_strengths(block) for block in blocks(model)]


def _strengths(block: Block) -> Matrix:
    readers = [*block.layers, block.reader]
    # Each reader sees what the one before saw, and behind it what that one has made.
    widths = [reader.weight.shape[1] for reader in readers]
    starts = [0, *widths[:-1]]
    found = np.full((len(readers), len(readers)), np.nan)
    for column, reader in enumerate(readers):
        # Over what the reader makes, and over space: a mean for each channel that it reads.
        weight = reader.weight.detach().double().abs().cpu().numpy()
        channels = weight.mean(axis=(0, *range(2, weight.ndim)))
        for row in range(column + 1):
            found[row, column] = channels[starts[row] : widths[row]].mean()
    return found


def draw_connections(
    matrices: Sequence[Matrix], path: Path, title: str, metadata: dict[str, str] | None = None
) -> None:
    """Draw one panel a block into a PNG, with colours relative to the block's strongest connection.

    The last column of each, what leaves the block, is framed in black. Readers with another shape
    (1x1 convolutions, the classifier) have weights of another size as well: compare within a
    column first. `metadata` goes into the file.
    """
    figure = drawing.new_figure(3.3 * len(matrices) + 0.9, 4)
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for i, (axes, matrix) in enumerate(zip(panels, matrices, strict=True), start=1):
        last = ("C", "classifier") if i == len(matrices) else ("T", f"transition {i}")
        shown = _draw_panel(axes, matrix, *last)
        axes.set_title(f"dense block {i}\nstrongest: {np.nanmax(matrix):.3g}", fontsize=9)
    panels[0].set_ylabel("source layer, 0: input of the block", fontsize=8)
    bar = figure.colorbar(shown, ax=list(panels), fraction=0.05, shrink=0.8, pad=0.01)
    bar.set_label("mean absolute weight / strongest of the block", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    drawing.anybodys([figure.suptitle(title, fontsize=10)])
    drawing.save(figure, path, metadata)


def _draw_panel(axes: "Axes", matrix: Matrix, sign: str, follows: str) -> "AxesImage":
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    layers = len(matrix) - 1
    # Readers are counted from 1 on, sources from 0 on.
    extent = (0.5, layers + 1.5, layers + 0.5, -0.5)
    relative = matrix / (float(np.nanmax(matrix)) or 1)
    shown = axes.imshow(relative, extent=extent, vmin=0, vmax=1, interpolation="nearest")
    axes.set_facecolor("0.93")
    frame = Rectangle((layers + 0.5, -0.5), 1, layers + 1, fill=False, linewidth=1.6, clip_on=False)
    axes.add_patch(frame)
    ticks = MaxNLocator(7, integer=True).tick_values(1, layers)
    numbers = [int(tick) for tick in ticks if 1 <= tick <= layers + 0.5 - layers / 15]
    axes.set_xticks([*numbers, layers + 1], [*map(str, numbers), sign])
    axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel(f"target layer, {sign}: {follows}", fontsize=8)
    axes.tick_params(labelsize=7)
    return shown
