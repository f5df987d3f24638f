"""Triton kernels that pool relu(x * scale + shift), and their way back; for one and two axes.

In train mode the gradient of x needs sums over all rows first. So backward goes over x twice, and
finds the gradient of what was pooled anew each time: nothing as large as x is stored in between.

- Averages: each row looks up its window's gradient. Windows do not overlap.
- Maxima: forward leaves for each which place of its window it was, and 255 where it was not above
  zero, so that backward need not ask for relu. The sums are made over maxima, which are fewer than
  rows; then each row asks the windows that it is in, so that nobody adds to what another wrote.
"""

# Kernels are written in Triton's language, which has no types that mypy could follow.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from densely.fused.kernels.operands import Affine, NormGradient, Pooling, Space
from densely.fused.kernels.triton_elementwise import masked, tiling
from densely.fused.kernels.triton_tiles import launch, normalised
from densely.fused.kernels.triton_vectors import finish_norm

_UNROLLED = 9  # places of a window that are all in flight at once; of larger ones 32 are


def pool(
    x: Tensor, affine: Affine, pooling: Pooling, space: Space, out: Tensor, choice: Tensor | None
) -> None:
    """Pool relu(x * scale + shift), [rows, C] to `out` [pooled rows, C].

    For maxima `choice`, uint8 of the shape of `out`, becomes what `pool_backward` needs.
    """
    rows, columns = out.shape
    largest = pooling.kind == "max"
    kernel = _kernel(pooling)
    shared = (x, affine.scale, affine.shift, out)
    if not largest and prod(kernel) > _UNROLLED:
        tiles = tiling(4096, x, out)
        launch(
            _average_large, (rows * tiles.blocks,), x,
            *shared, columns // tiles.unit, x.stride(0) // tiles.unit,
            out.stride(0) // tiles.unit, *_geometry(pooling, space), **tiles.options,
        )  # fmt: skip
        return
    tiles = tiling(1024 if largest else 2048, x, out)
    launch(
        _pool, (triton.cdiv(rows, tiles.rows) * tiles.blocks,), x,
        *shared, choice, rows, columns // tiles.unit, x.stride(0) // tiles.unit,
        out.stride(0) // tiles.unit, *_geometry(pooling, space),
        LARGEST=largest, KERNEL_H=kernel[0], KERNEL_W=kernel[1], **tiles.options,
    )  # fmt: skip


def pool_backward(
    grad: Tensor,
    choice: Tensor | None,
    x: Tensor,
    affine: Affine,
    pooling: Pooling,
    space: Space,
    out: Tensor,
) -> NormGradient:
    """Back through `pool`: the gradient of x to `out` [rows, C], and those of the norm's weights.

    `grad` is [pooled rows, C], `choice` what `pool` has left for maxima.
    """
    if pooling.kind == "max":
        assert choice is not None
        partials = _largest_sums(grad, choice, x, affine, pooling, space)
        norm, terms, _ = finish_norm(partials, affine, x.shape[0])
        _largest_spread(grad, choice, x, affine, pooling, space, terms, out)
        return norm
    if affine.training:
        partials = _average_back(grad, x, affine, pooling, space, None, None, True)
        norm, terms, _ = finish_norm(partials, affine, x.shape[0])
        _average_back(grad, x, affine, pooling, space, terms, out, False)
        return norm
    partials = _average_back(grad, x, affine, pooling, space, None, out, True)
    return finish_norm(partials, affine, x.shape[0]).norm


def _average_back(
    grad: Tensor,
    x: Tensor,
    affine: Affine,
    pooling: Pooling,
    space: Space,
    terms: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
    sums: bool,
) -> Any:
    """One pass over x: the parts of the norm's sums, if asked for, and the gradient, if `out`."""
    rows, columns = x.shape
    tiles = tiling(2048, x, grad, x if out is None else out)
    tile_rows = tiles.tile_rows(rows, 5) if sums else tiles.rows
    parts = triton.cdiv(rows, tile_rows)
    partials = x.new_empty(parts, 2, columns, dtype=torch.float32) if sums else None
    launch(
        _average_backward, (parts * tiles.blocks,), x,
        grad, x, affine.scale, affine.shift, affine.mean, *(terms or (None, None)), out, partials,
        rows, columns // tiles.unit, grad.stride(0) // tiles.unit, x.stride(0) // tiles.unit,
        0 if out is None else out.stride(0) // tiles.unit, tile_rows,
        *_geometry(pooling, space), **tiles.options,
    )  # fmt: skip
    return partials


def _largest_sums(
    grad: Tensor, choice: Tensor, x: Tensor, affine: Affine, pooling: Pooling, space: Space
) -> Tensor:
    """Parts of the norm's sums."""
    rows, columns = grad.shape
    tiles = tiling(1024, x, grad, choice)
    tile_rows = tiles.tile_rows(rows, 6)
    parts = triton.cdiv(rows, tile_rows)
    partials = x.new_empty(parts, 2, columns, dtype=torch.float32)
    kernel = _kernel(pooling)
    launch(
        _max_sums, (parts * tiles.blocks,), x,
        grad, choice, x, affine.mean, partials, rows, columns // tiles.unit,
        grad.stride(0) // tiles.unit, x.stride(0) // tiles.unit, tile_rows,
        *_geometry(pooling, space), KERNEL_H=kernel[0], KERNEL_W=kernel[1], **tiles.options,
    )  # fmt: skip
    return partials


def _largest_spread(
    grad: Tensor,
    choice: Tensor,
    x: Tensor,
    affine: Affine,
    pooling: Pooling,
    space: Space,
    terms: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    """The gradient of x to `out`."""
    rows, columns = x.shape
    tiles = tiling(2048, x, grad, choice, out)
    kernel, step = _kernel(pooling), _two(pooling.step)
    launch(
        _max_spread, (triton.cdiv(rows, tiles.rows) * tiles.blocks,), x,
        grad, choice, x, affine.scale, affine.mean, *(terms or (None, None)), out,
        rows, columns // tiles.unit, grad.stride(0) // tiles.unit, x.stride(0) // tiles.unit,
        out.stride(0) // tiles.unit, *_geometry(pooling, space),
        KERNEL_H=kernel[0], KERNEL_W=kernel[1],
        WINDOWS_H=triton.cdiv(kernel[0], step[0]), WINDOWS_W=triton.cdiv(kernel[1], step[1]),
        **tiles.options,
    )  # fmt: skip


def _two(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Height and width; a signal has a height of 1."""
    return (1,) * (2 - len(sizes)) + sizes


def _kernel(pooling: Pooling) -> tuple[int, ...]:
    """Places of a window along height and width."""
    return _two(pooling.step if pooling.kind == "average" else (3,) * len(pooling.step))


def _geometry(pooling: Pooling, space: Space) -> tuple[int, ...]:
    """Sizes of the input and of the output, and steps, along height and width."""
    return (*_two(space.size), *_two(pooling.pooled(space).size), *_two(pooling.step))


@triton.jit
def _divide(number, divisor):
    """The quotient of numbers below a million, rounded down, for a fraction of the price."""
    return ((number.to(tl.float32) + 0.5) * (1.0 / divisor)).to(tl.int32)


@triton.jit
def _place(first, offset, height, width):
    """Image, line and place in the line of the rows first + offset."""
    w = first % width + offset
    line = first // width
    lines = _divide(w, width)
    h = line % height + lines
    images = _divide(h, height)
    return line // height + images, h - images * height, w - lines * width


@triton.jit
def _tile(columns, COLUMNS: tl.constexpr):
    """As in `triton_elementwise`."""
    blocks = tl.cdiv(columns, COLUMNS)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.program_id(0) // blocks, c, c < columns


_GEOMETRY = ["height", "width", "out_height", "out_width", "step_h", "step_w"]


@triton.jit(do_not_specialize=["rows", "columns", "x_stride", "out_stride", *_GEOMETRY])
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
    tile, c, inside = _tile(columns * UNIT, COLUMNS)
    offset = tl.arange(0, ROWS)[:, None]
    image, h, w = _place(tile * ROWS, offset, out_height, out_width)
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


@triton.jit(do_not_specialize=["columns", "x_stride", "out_stride", *_GEOMETRY])
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
    r, c, inside = _tile(columns * UNIT, COLUMNS)
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
        i = _divide(place, step_w)
        row = first + i * width + (place - i * step_w)
        at = x + row.to(tl.int64) * (x_stride * UNIT) + c
        value = tl.load(at, mask=there & inside, other=0.0)
        value = normalised(value, s, b).to(tl.float32)
        total += tl.where(there, value, 0.0)
    mean = tl.sum(total, axis=0)[None, :] / places
    to = out + r.to(tl.int64) * (out_stride * UNIT) + c
    tl.store(to, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "grad_stride", "x_stride", "out_stride", "tile_rows", *_GEOMETRY
    ]
)  # fmt: skip
def _average_backward(
    grad,  # [images * out_height * out_width, C]
    x,  # [rows, C]
    scale,  # [C]
    shift,  # [C]
    mean,  # [C]
    a,  # [C] or None
    b,  # [C] or None
    out,  # [rows, C] or None
    partials,  # [tiles, 2, C] or None
    rows,
    columns,  # in units, as the strides
    grad_stride,
    x_stride,
    out_stride,
    tile_rows,
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
    tile, c, inside = _tile(columns * UNIT, COLUMNS)
    s = tl.load(scale + c, mask=inside, other=0.0)
    t = tl.load(shift + c, mask=inside, other=0.0)
    m = tl.load(mean + c, mask=inside, other=0.0)
    if a is not None:
        less = tl.load(a + c, mask=inside, other=0.0)
        slope = tl.load(b + c, mask=inside, other=0.0)
    share = 1.0 / (step_h * step_w)
    first = tile * tile_rows
    last = tl.minimum(first + tile_rows, rows)
    sum_g = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_gx = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        image, h, w = _place(first, r - first, height, width)
        h, w = _divide(h, step_h), _divide(w, step_w)
        valid = (r < last) & inside
        pooled = valid & (h < out_height) & (w < out_width)
        window = (image * out_height + h) * out_width + w
        r = r.to(tl.int64)
        value = tl.load(x + r * (x_stride * UNIT) + c, mask=valid, other=0.0)
        at = grad + window.to(tl.int64) * (grad_stride * UNIT) + c
        g = masked(tl.load(at, mask=pooled, other=0.0).to(tl.float32) * share, value, s, t)
        value = value.to(tl.float32) - m
        sum_g += g
        sum_gx += g * value
        if out is not None:
            g = g * s
            if a is not None:
                g -= less + value * slope
            to = out + r * (out_stride * UNIT) + c
            tl.store(to, g.to(out.dtype.element_ty), mask=valid)
    if partials is not None:
        to = partials + tile.to(tl.int64) * (2 * columns * UNIT) + c
        tl.store(to, tl.sum(sum_g, axis=0)[None, :], mask=inside)
        tl.store(to + columns * UNIT, tl.sum(sum_gx, axis=0)[None, :], mask=inside)


@triton.jit(
    do_not_specialize=["rows", "columns", "grad_stride", "x_stride", "tile_rows", *_GEOMETRY]
)
def _max_sums(
    grad,  # [rows, C]
    choice,  # [rows, C]
    x,  # [images * height * width, C]
    mean,  # [C]
    partials,  # [tiles, 2, C]
    rows,
    columns,  # in units, as the strides
    grad_stride,
    x_stride,
    tile_rows,
    height,
    width,
    out_height,
    out_width,
    step_h,
    step_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, c, inside = _tile(columns * UNIT, COLUMNS)
    m = tl.load(mean + c, mask=inside, other=0.0)
    first = tile * tile_rows
    last = tl.minimum(first + tile_rows, rows)
    sum_g = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_gx = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        exists = r < last
        image, h, w = _place(first, r - first, out_height, out_width)
        h = h * step_h - KERNEL_H // 2
        w = w * step_w - KERNEL_W // 2
        r = r.to(tl.int64)
        which = tl.load(choice + r * (columns * UNIT) + c, mask=exists & inside, other=255)
        which = which.to(tl.int32)
        g = tl.load(grad + r * (grad_stride * UNIT) + c, mask=exists & inside, other=0.0)
        g = tl.where(which < 255, g.to(tl.float32), 0.0)
        center = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.static_range(KERNEL_H):
            for j in tl.static_range(KERNEL_W):
                there = exists & (h + i >= 0) & (h + i < height) & (w + j >= 0) & (w + j < width)
                row = (image * height + h + i) * width + w + j
                at = x + row.to(tl.int64) * (x_stride * UNIT) + c
                value = tl.load(at, mask=there & inside, other=0.0).to(tl.float32)
                center = tl.where(which == i * KERNEL_W + j, value, center)
        sum_g += g
        sum_gx += tl.where(which < 255, g * (center - m), 0.0)
    to = partials + tile.to(tl.int64) * (2 * columns * UNIT) + c
    tl.store(to, tl.sum(sum_g, axis=0)[None, :], mask=inside)
    tl.store(to + columns * UNIT, tl.sum(sum_gx, axis=0)[None, :], mask=inside)


@triton.jit(
    do_not_specialize=["rows", "columns", "grad_stride", "x_stride", "out_stride", *_GEOMETRY]
)
def _max_spread(
    grad,  # [images * out_height * out_width, C]
    choice,  # of the same shape
    x,  # [rows, C]
    scale,  # [C]
    mean,  # [C]
    a,  # [C] or None
    b,  # [C] or None
    out,  # [rows, C]
    rows,
    columns,  # in units, as the strides
    grad_stride,
    x_stride,
    out_stride,
    height,
    width,
    out_height,
    out_width,
    step_h,
    step_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WINDOWS_H: tl.constexpr,  # that a row is in, at most
    WINDOWS_W: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, c, inside = _tile(columns * UNIT, COLUMNS)
    offset = tl.arange(0, ROWS)[:, None]
    image, h, w = _place(tile * ROWS, offset, height, width)
    r = tile * ROWS + offset
    exists = r < rows
    # Window o holds the places o * step - KERNEL // 2 and KERNEL - 1 more.
    last_h, last_w = _divide(h + KERNEL_H // 2, step_h), _divide(w + KERNEL_W // 2, step_w)
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    for back_h in tl.static_range(WINDOWS_H):
        for back_w in tl.static_range(WINDOWS_W):
            o_h, o_w = last_h - back_h, last_w - back_w
            i = h + KERNEL_H // 2 - o_h * step_h
            j = w + KERNEL_W // 2 - o_w * step_w
            there = exists & (o_h >= 0) & (o_h < out_height) & (o_w >= 0) & (o_w < out_width)
            there = there & (i < KERNEL_H) & (j < KERNEL_W)
            window = ((image * out_height + o_h) * out_width + o_w).to(tl.int64)
            at = choice + window * (columns * UNIT) + c
            which = tl.load(at, mask=there & inside, other=255).to(tl.int32)
            at = grad + window * (grad_stride * UNIT) + c
            up = tl.load(at, mask=there & inside, other=0.0).to(tl.float32)
            g += tl.where(which == i * KERNEL_W + j, up, 0.0)
    g = g * tl.load(scale + c, mask=inside, other=0.0)
    r = r.to(tl.int64)
    if a is not None:
        value = tl.load(x + r * (x_stride * UNIT) + c, mask=exists & inside, other=0.0)
        value = value.to(tl.float32) - tl.load(mean + c, mask=inside, other=0.0)
        g -= tl.load(a + c, mask=inside, other=0.0)
        g -= value * tl.load(b + c, mask=inside, other=0.0)
    to = out + r * (out_stride * UNIT) + c
    tl.store(to, g.to(out.dtype.element_ty), mask=exists & inside)
