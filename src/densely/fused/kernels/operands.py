"""What the kernels of the fused steps take and give, in named tuples.

All work on matrices: a map [N, C, *space] in channels-last order is [N * places, C], a row for each
place, and the first C' channels are a view of its first columns. Rows may be further apart than
they are long; columns stand side by side.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod
from typing import Literal, NamedTuple

from torch import Tensor


class Space(NamedTuple):
    """Which place of which image a row is: row = (image * H + h) * W + w."""

    batch: int
    size: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of rows of a matrix."""
        return self.batch * prod(self.size)

    def maps(self, matrix: Tensor) -> Tensor:
        """[rows, C] as [N, C, *space], the same memory."""
        return matrix.view(self.batch, *self.size, matrix.shape[1]).movedim(-1, 1)

    def made(self, matrix: Tensor) -> Tensor:
        """`maps` as a step gives them: no view, which nobody could change in place.

        Where a backward reads them, as that of a dense block, PyTorch's own error says so.
        """
        return self.maps(matrix).detach()

    def matrix(self, maps: Tensor) -> Tensor:
        """[N, C, *space] as [rows, C]; copied only where its channels do not stand side by side."""
        matrix = maps.movedim(1, -1).reshape(self.rows, maps.shape[1])
        return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


class Affine(NamedTuple):
    """What a batch norm does at a call, x * scale + shift; vectors [C] of the accumulation dtype.

    `mean` and `rstd` (1 / sqrt(var + eps)) are of the batch if `training`, else constants.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor
    training: bool

    @classmethod
    def kept(cls, vectors: Tensor, mean: Tensor, training: bool) -> "Affine":
        """From scale, shift and rstd as they were kept, [3, C], and the mean in any dtype."""
        scale, shift, rstd = vectors
        return cls(scale, shift, mean.to(scale.dtype).contiguous(), rstd, training)


class NormVectors(NamedTuple):
    """A batch norm's vectors [C] as `Kernels.affine` takes them.

    `mean` and `var` are of the accumulation dtype and of the batch if `training`, or else running
    statistics in any dtype.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float
    training: bool


class Unfinished(NamedTuple):
    """Moments of a matrix's columns that are in parts yet, and where they go.

    `partials` and `tile_rows` are as `triton_vectors` has them, for that many `rows`.
    """

    partials: Tensor
    tile_rows: int
    rows: int
    mean: Tensor
    var: Tensor


class Convolution(NamedTuple):
    """What makes conv(relu(x * scale + shift)) + bias of an x; it keeps the size of the maps.

    weight [O, C, *kernel] and bias [O] or None are of the dtype of the maps, which `space` is of.
    """

    affine: Affine
    weight: Tensor
    bias: Tensor | None
    dilation: int
    space: Space

    @property
    def pointwise(self) -> bool:
        """Whether its kernel sees one place only."""
        return is_pointwise(self.weight)


class FirstConvolution(NamedTuple):
    """A convolution that reads images of `space`, with two axes: no bias, and no padding.

    weight [O, C, kh, kw] is of the dtype of the images; the stride is an axis each.
    """

    weight: Tensor
    stride: tuple[int, ...]
    space: Space

    @property
    def made(self) -> Space:
        """The space of the result."""
        places = window_places(self.space.size, self.weight.shape[2:], self.stride)
        return Space(self.space.batch, places)


def window_places(
    sizes: Sequence[int], window: Sequence[int], stride: Sequence[int]
) -> tuple[int, ...]:
    """How many a window has along each axis; below 1 where there is no room for it."""
    axes = zip(sizes, window, stride, strict=True)
    return tuple((size - seen) // step + 1 for size, seen, step in axes)


class Pending(NamedTuple):
    """A gradient that its reader forms as it reads: g * scale - a - (x - mean) * b.

    This is what a batch norm hands back (see `densely.fused.block`). `g` and `x` are matrices, the
    others vectors; None stands for a scale of 1, and for `a` and `b` of 0.
    """

    g: Tensor
    x: Tensor
    scale: Tensor | None
    mean: Tensor | None
    a: Tensor | None
    b: Tensor | None


class Pooling(NamedTuple):
    """How places are pooled, an axis each.

    "average": over windows of `step` that do not overlap; an incomplete last one is left out.
    "max": over 3 places, padded by 1, every `step`.
    """

    kind: Literal["average", "max"]
    step: tuple[int, ...]

    def pooled(self, space: Space) -> Space:
        """The space of the result."""
        if self.kind == "average":
            sizes = (size // step for size, step in zip(space.size, self.step, strict=True))
        else:
            sizes = (
                (size - 1) // step + 1 for size, step in zip(space.size, self.step, strict=True)
            )
        return Space(space.batch, tuple(sizes))


class NormGradient(NamedTuple):
    """Gradients of a norm's weight and bias, of the accumulation dtype."""

    weight: Tensor
    bias: Tensor


def side_by_side(sizes: Iterable[int]) -> tuple[list[slice], int]:
    """Where vectors stand in one that holds them all, and its length.

    Each begins where loads are wide.
    """
    sizes = list(sizes)
    *starts, length = accumulate((size + -size % 4 for size in sizes), initial=0)
    return [slice(at, at + size) for at, size in zip(starts, sizes, strict=True)], length


def is_pointwise(weight: Tensor) -> bool:
    """Whether the kernel sees one place only."""
    return weight.shape[2:].numel() == 1
