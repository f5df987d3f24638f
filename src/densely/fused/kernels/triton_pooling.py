"""Triton kernels that pool relu(x * scale + shift), for one and two axes.

For maxima forward leaves which place of its window each was, and 255 where it was not above zero,
so that `triton_pooling_backward` need not ask for relu. What both share stands here too.
"""

# Kernels are written in Triton's language, which has no types that mypy could follow.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from densely.fused.kernels.operands import Affine, Pooling, Space
from densely.fused.kernels.triton_elementwise import tiling
from densely.fused.kernels.triton_tiles import cdiv, divide, launch, normalised, place_of

UNROLLED = 9  # places of a window that are all in flight at once; of larger ones 32 are


def pool(
    x: Tensor, affine: Affine, pooling: Pooling, space: Space, out: Tensor, choice: Tensor | None
) -> None:
    """Pool relu(x * scale + shift), [rows, C] to `out` [pooled rows, C].

    For maxima `choice`, uint8 of the shape of `out`, becomes what backward needs.
    """
    rows, columns = out.shape
    largest = pooling.kind == "max"
    kernel = window_of(pooling)
    shared = (x, affine.scale, affine.shift, out)
    if not largest and prod(kernel) > UNROLLED:
        tiles = tiling(4096, x, out)
        launch(
            _average_large, (rows * tiles.blocks,), x,
            *shared, columns // tiles.unit, x.stride(0) // tiles.unit,
            out.stride(0) // tiles.unit, *geometry(pooling, space), **tiles.options,
        )  # fmt: skip
        return
    tiles = tiling(1024 if largest else 2048, x, out)
    launch(
        _pool, (cdiv(rows, tiles.rows) * tiles.blocks,), x,
        *shared, choice, rows, columns // tiles.unit, x.stride(0) // tiles.unit,
        out.stride(0) // tiles.unit, *geometry(pooling, space),
        LARGEST=largest, KERNEL_H=kernel[0], KERNEL_W=kernel[1], **tiles.options,
    )  # fmt: skip


def two(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Height and width; a signal has a height of 1."""
    return (1,) * (2 - len(sizes)) + sizes


def window_of(pooling: Pooling) -> tuple[int, ...]:
    """Places of a window along height and width."""
    return two(pooling.step if pooling.kind == "average" else (3,) * len(pooling.step))


def geometry(pooling: Pooling, space: Space) -> tuple[int, ...]:
    """Sizes of the input and of the output, and steps, along height and width."""
    return (*two(space.size), *two(pooling.pooled(space).size), *two(pooling.step))


@triton.jit
def tile_of(columns, COLUMNS: tl.constexpr):
    """As in `triton_elementwise`."""
    blocks = tl.cdiv(columns, COLUMNS)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.program_id(0) // blocks, c, c < columns


GEOMETRY = ["height", "width", "out_height", "out_width", "step_h", "step_w"]


@triton.jit(do_not_specialize=["rows", "columns", "x_stride", "out_stride", *GEOMETRY])
def _pool(
    x,  # [images * height * width, C]
    scale,  # [C]
    shift,  # [C]
    out,  # [rows, C]
    choice,  # [rows, C] for maxima, or None
    rows,
    columns,  # in units, as the strides
    x_stride,
    out_stride,
    height,
    width,
    out_height,
    out_width,
    step_h,
    step_w,
    LARGEST: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, c, inside = tile_of(columns * UNIT, COLUMNS)
    offset = tl.arange(0, ROWS)[:, None]
    image, h, w = place_of(tile * ROWS, offset, out_height, out_width)
    r = tile * ROWS + offset
    exists = r < rows
    h *= step_h
    w *= step_w
    if LARGEST:  # one place before the step's own belongs to the window, along an axis of three
        h -= KERNEL_H // 2
        w -= KERNEL_W // 2
    s = tl.load(scale + c, mask=inside, other=0.0)
    b = tl.load(shift + c, mask=inside, other=0.0)
    best = tl.full([ROWS, COLUMNS], float("-inf") if LARGEST else 0.0, tl.float32)
    which = tl.zeros([ROWS, COLUMNS], tl.int32)
    for i in tl.static_range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            there = exists & (h + i >= 0) & (h + i < height) & (w + j >= 0) & (w + j < width)
            row = (image * height + h + i) * width + w + j
            at = x + row.to(tl.int64) * (x_stride * UNIT) + c
            value = tl.load(at, mask=there & inside, other=0.0)
            value = normalised(value, s, b).to(tl.float32)
            if LARGEST:
                wins = ((value > best) | (value != value)) & there  # the first of equal ones; NaN
                best = tl.where(wins, value, best)
                which = tl.where(wins, i * KERNEL_W + j, which)
            else:
                best += value
    if not LARGEST:
        best = best * (1.0 / (KERNEL_H * KERNEL_W))
    at = r.to(tl.int64) * (out_stride * UNIT) + c
    tl.store(out + at, best.to(out.dtype.element_ty), mask=exists & inside)
    if LARGEST:
        at = r.to(tl.int64) * (columns * UNIT) + c
        which = tl.where(best <= 0, 255, which)  # NaN keeps its place
        tl.store(choice + at, which.to(tl.uint8), mask=exists & inside)


@triton.jit(do_not_specialize=["columns", "x_stride", "out_stride", *GEOMETRY])
def _average_large(
    x,  # [images * height * width, C]
    scale,  # [C]
    shift,  # [C]
    out,  # [rows, C], a program a row
    columns,  # in units, as the strides
    x_stride,
    out_stride,
    height,
    width,
    out_height,
    out_width,
    step_h,
    step_w,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r, c, inside = tile_of(columns * UNIT, COLUMNS)
    line = r // out_width
    first = (line // out_height * height + line % out_height * step_h) * width
    first += r % out_width * step_w
    s = tl.load(scale + c, mask=inside, other=0.0)
    b = tl.load(shift + c, mask=inside, other=0.0)
    places = step_h * step_w
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, places, ROWS):
        place = start + tl.arange(0, ROWS)[:, None]
        there = place < places
        i = divide(place, step_w)
        row = first + i * width + (place - i * step_w)
        at = x + row.to(tl.int64) * (x_stride * UNIT) + c
        value = tl.load(at, mask=there & inside, other=0.0)
        value = normalised(value, s, b).to(tl.float32)
        total += tl.where(there, value, 0.0)
    mean = tl.sum(total, axis=0)[None, :] / places
    to = out + r.to(tl.int64) * (out_stride * UNIT) + c
    tl.store(to, mean.to(out.dtype.element_ty), mask=inside)
