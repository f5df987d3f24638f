"""Triton kernels that pass once over a matrix: norm and relu, their way back, moments, gradients.

They are bound by memory: what counts is that a thread moves 16 bytes at a time, and that nothing
is read twice. Columns and strides come in units of the largest power of two that divides them all:
by the factor UNIT the compiler sees how wide it may load, and a kernel is compiled for each unit
and not for each width. Row numbers are 32 bits wide, offsets 64.

Sums over rows leave a part for each tile of rows; `triton_vectors` puts them together.
"""

# Kernels are written in Triton's language, which has no types that mypy could follow.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densely.fused.kernels.operands import Affine, Pending
from densely.fused.kernels.triton_tiles import (
    cdiv,
    launch,
    multiprocessors,
    next_power_of_2,
    normalised,
    unit_of,
)


class Tiling(NamedTuple):
    """How a matrix is shared out: `unit` divides its columns, `rows` and `columns` are a turn's."""

    unit: int
    rows: int
    columns: int
    blocks: int  # of columns

    @property
    def options(self) -> dict[str, int]:
        """What a kernel is compiled for."""
        return {"UNIT": self.unit, "ROWS": self.rows, "COLUMNS": self.columns, "num_warps": 4}

    def tile_rows(self, x: Tensor, programs: int) -> int:
        """Rows of a program that sums over those of x, for so many programs on a multiprocessor.

        With as many as it has registers for, all run from the start and end together.
        """
        programs = max(1, multiprocessors(x.device) * programs // self.blocks)
        return int(cdiv(cdiv(x.shape[0], programs), self.rows) * self.rows)


def tiling(values: int, *matrices: Tensor) -> Tiling:
    """For matrices of as many columns, with about so many values a program's turn."""
    columns = matrices[0].shape[1]
    unit = unit_of(columns, *(matrix.stride(0) for matrix in matrices))
    wide = max(16, min(128, next_power_of_2(columns)))
    while wide > 32 and cdiv(columns, wide) * wide > 1.15 * columns:
        wide //= 2
    return Tiling(unit, values // max(wide, 32), wide, cdiv(columns, wide))


def norm_relu(x: Tensor, affine: Affine, out: Tensor | None = None) -> Tensor:
    """relu(x * scale + shift), [rows, C] of x's dtype; to `out`, if given."""
    rows, columns = x.shape
    out = x.new_empty(x.shape) if out is None else out
    tiles = tiling(4096, x, out)
    grid = (cdiv(rows, tiles.rows) * tiles.blocks,)
    launch(
        _norm_relu, grid, x,
        x, affine.scale, affine.shift, out, rows, columns // tiles.unit,
        x.stride(0) // tiles.unit, out.stride(0) // tiles.unit, **tiles.options,
    )  # fmt: skip
    return out


def moments(x: Tensor, out: Tensor | None = None) -> tuple[Tensor, int]:
    """Moments of x's tiles of rows, and how many rows a tile has: see `triton_vectors`.

    Copies x to `out` in passing.
    """
    rows, columns = x.shape
    tiles = tiling(2048, x, x if out is None else out)
    tile_rows = tiles.tile_rows(x, 8)
    parts = cdiv(rows, tile_rows)
    partials = x.new_empty(parts, 2, columns, dtype=torch.float32)
    launch(
        _moments, (parts * tiles.blocks,), x,
        x, out, partials, rows, columns // tiles.unit, x.stride(0) // tiles.unit,
        0 if out is None else out.stride(0) // tiles.unit, tile_rows,
        **tiles.options,
    )  # fmt: skip
    return partials, tile_rows


def norm_relu_backward(
    g: Tensor, x: Tensor, affine: Affine, total: Tensor, base: Tensor | None, add_scaled: bool
) -> Tensor:
    """Mask the gradient g [rows, C] of `norm_relu`'s output where that is zero.

    With `add_scaled`, `total` becomes (base or total) + scale * g, else g.

    Returns:
        Parts of the norm's sums: see `triton_vectors`.
    """
    rows, columns = x.shape
    before = (total if base is None else base) if add_scaled else None
    tiles = tiling(2048, g, x, total, total if before is None else before)
    tile_rows = tiles.tile_rows(x, 4)
    parts = cdiv(rows, tile_rows)
    partials = x.new_empty(parts, 2, columns, dtype=torch.float32)
    launch(
        _norm_relu_backward, (parts * tiles.blocks,), x,
        g, x, affine.scale, affine.shift, affine.mean, before, total, partials,
        rows, columns // tiles.unit, g.stride(0) // tiles.unit, x.stride(0) // tiles.unit,
        0 if before is None else before.stride(0) // tiles.unit, total.stride(0) // tiles.unit,
        tile_rows, **tiles.options,
    )  # fmt: skip
    return partials


def form(pending: Pending, out: Tensor) -> None:
    """G * scale - a - (x - mean) * b to `out` [rows, C]."""
    g, x, scale, mean, a, b = pending
    rows, columns = g.shape
    tiles = tiling(4096, g, x, out)
    grid = (cdiv(rows, tiles.rows) * tiles.blocks,)
    launch(
        _form, grid, g,
        g, None if mean is None else x, scale, mean, a, b, out, rows, columns // tiles.unit,
        g.stride(0) // tiles.unit, x.stride(0) // tiles.unit, out.stride(0) // tiles.unit,
        **tiles.options,
    )  # fmt: skip


@triton.jit
def masked(g, x, scale, shift):
    """The gradient g where relu(x * scale + shift) is above zero, as forward has rounded that."""
    return tl.where(normalised(x, scale, shift) <= 0, 0.0, g.to(tl.float32))


@triton.jit
def store_sums(partials, tile, C, c, inside, sum_g, sum_gx):
    """A program's part of the norm's sums, [tiles, 2, C]: see `triton_vectors`."""
    to = partials + tile.to(tl.int64) * (2 * C) + c
    tl.store(to, tl.sum(sum_g, axis=0)[None, :], mask=inside)
    tl.store(to + C, tl.sum(sum_gx, axis=0)[None, :], mask=inside)


@triton.jit
def _tile(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Number of a program's tile of rows, its columns, which of them there are."""
    blocks = tl.cdiv(columns, COLUMNS)  # of one tile side by side, as its rows lie in memory
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.program_id(0) // blocks, c, c < columns


@triton.jit(do_not_specialize=["rows", "columns", "x_stride", "out_stride"])
def _norm_relu(
    x,  # [rows, C]
    scale,  # [C]
    shift,  # [C]
    out,  # [rows, C]
    rows,
    columns,  # in units, as the strides
    x_stride,
    out_stride,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, c, inside = _tile(columns * UNIT, ROWS, COLUMNS)
    r = tile * ROWS + tl.arange(0, ROWS)[:, None]
    valid = (r < rows) & inside
    value = tl.load(x + r.to(tl.int64) * (x_stride * UNIT) + c, mask=valid, other=0.0)
    s = tl.load(scale + c, mask=inside, other=0.0)
    b = tl.load(shift + c, mask=inside, other=0.0)
    to = out + r.to(tl.int64) * (out_stride * UNIT) + c
    tl.store(to, normalised(value, s, b), mask=valid)


@triton.jit(do_not_specialize=["rows", "columns", "x_stride", "out_stride", "tile_rows"])
def _moments(
    x,  # [rows, C]
    out,  # [rows, C] or None
    partials,  # [tiles, 2, C]
    rows,
    columns,  # in units, as the strides
    x_stride,
    out_stride,
    tile_rows,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, c, inside = _tile(columns * UNIT, ROWS, COLUMNS)
    first = tile * tile_rows
    last = tl.minimum(first + tile_rows, rows)
    count = tl.zeros([ROWS, 1], tl.float32)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    m2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):  # Welford's update, for each thread's own rows
        r = start + tl.arange(0, ROWS)[:, None]
        more = r < last
        value = tl.load(x + r.to(tl.int64) * (x_stride * UNIT) + c, mask=more & inside, other=0.0)
        if out is not None:
            to = out + r.to(tl.int64) * (out_stride * UNIT) + c
            tl.store(to, value, mask=more & inside)
        value = value.to(tl.float32)
        count += more.to(tl.float32)
        delta = tl.where(more, value - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))
        m2 += delta * (value - mean)
    total = (last - first).to(tl.float32)
    whole = tl.sum(mean * count, axis=0)[None, :] / total
    delta = mean - whole
    second = tl.sum(m2 + delta * delta * count, axis=0)[None, :]
    to = partials + tile.to(tl.int64) * (2 * columns * UNIT) + c
    tl.store(to, whole, mask=inside)
    tl.store(to + columns * UNIT, second, mask=inside)


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "g_stride", "x_stride", "before_stride", "total_stride", "tile_rows"
    ]
)  # fmt: skip
def _norm_relu_backward(
    g,  # [rows, C]
    x,  # [rows, C]
    scale,  # [C]
    shift,  # [C]
    mean,  # [C]
    before,  # [rows, C], to be added to, or None
    total,  # [rows, C]
    partials,  # [tiles, 2, C]
    rows,
    columns,  # in units, as the strides
    g_stride,
    x_stride,
    before_stride,
    total_stride,
    tile_rows,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, c, inside = _tile(columns * UNIT, ROWS, COLUMNS)
    s = tl.load(scale + c, mask=inside, other=0.0)
    b = tl.load(shift + c, mask=inside, other=0.0)
    m = tl.load(mean + c, mask=inside, other=0.0)
    first = tile * tile_rows
    last = tl.minimum(first + tile_rows, rows)
    sum_g = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_gx = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        valid = (r < last) & inside
        r = r.to(tl.int64)
        value = tl.load(x + r * (x_stride * UNIT) + c, mask=valid, other=0.0)
        up = tl.load(g + r * (g_stride * UNIT) + c, mask=valid, other=0.0)
        up = masked(up, value, s, b)
        sum_g += up
        sum_gx += up * (value.to(tl.float32) - m)
        if before is not None:
            old = tl.load(before + r * (before_stride * UNIT) + c, mask=valid, other=0.0)
            up = old.to(tl.float32) + s * up
        to = total + r * (total_stride * UNIT) + c
        tl.store(to, up.to(total.dtype.element_ty), mask=valid)
    store_sums(partials, tile, columns * UNIT, c, inside, sum_g, sum_gx)


@triton.jit(do_not_specialize=["rows", "columns", "g_stride", "x_stride", "out_stride"])
def _form(
    g,  # [rows, C]
    x,  # [rows, C]; None without a mean
    scale,  # [C] or None
    mean,  # [C] or None, as a and b
    a,
    b,
    out,  # [rows, C]
    rows,
    columns,  # in units, as the strides
    g_stride,
    x_stride,
    out_stride,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, c, inside = _tile(columns * UNIT, ROWS, COLUMNS)
    r = tile * ROWS + tl.arange(0, ROWS)[:, None]
    valid = (r < rows) & inside
    r = r.to(tl.int64)
    value = tl.load(g + r * (g_stride * UNIT) + c, mask=valid, other=0.0).to(tl.float32)
    if scale is not None:
        value = value * tl.load(scale + c, mask=inside, other=0.0)
    if mean is not None:
        center = tl.load(x + r * (x_stride * UNIT) + c, mask=valid, other=0.0).to(tl.float32)
        center -= tl.load(mean + c, mask=inside, other=0.0)
        value -= tl.load(a + c, mask=inside, other=0.0)
        value -= center * tl.load(b + c, mask=inside, other=0.0)
    to = out + r * (out_stride * UNIT) + c
    tl.store(to, value.to(out.dtype.element_ty), mask=valid)
