"""Triton kernels that go back through `triton_pooling`.

In train mode the gradient of x needs sums over all rows first. So backward goes over x twice, and
finds the gradient of what was pooled anew each time: nothing as large as x is stored in between.
The sums are made window by window; then each row asks the windows that it is in, so that nobody
adds to what another wrote. Windows of averages do not overlap, and large ones are summed by rows.
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
from densely.fused.kernels.triton_elementwise import masked, store_sums, tiling
from densely.fused.kernels.triton_pooling import (
    GEOMETRY,
    UNROLLED,
    geometry,
    pool,
    tile_of,
    two,
    window_of,
)
from densely.fused.kernels.triton_tiles import cdiv, divide, launch, normalised, place_of
from densely.fused.kernels.triton_vectors import finish_norm


def pool_backward(
    grad: Tensor,
    choice: Tensor | None,
    x: Tensor,
    affine: Affine,
    pooling: Pooling,
    space: Space,
    out: Tensor,
    again: Tensor | None = None,
) -> NormGradient:
    """Back through `pool`: the gradient of x to `out` [rows, C], and those of the norm's weights.

    `grad` is [pooled rows, C], `choice` what `pool` has left for maxima. Averages are made again,
    to `again` [pooled rows, C], if that is given.
    """
    in_passing = affine.training and prod(pooling.step) <= UNROLLED
    if again is not None and not in_passing:
        pool(x, affine, pooling, space, again, None)
    if pooling.kind == "max":
        assert choice is not None
        partials = _window_sums(grad, choice, x, affine, pooling, space, None)
        norm, terms, _ = finish_norm(partials, affine, x.shape[0])
        _largest_spread(grad, choice, x, affine, pooling, space, terms, out)
        return norm
    if affine.training:
        if in_passing:
            partials = _window_sums(grad, None, x, affine, pooling, space, again)
        else:
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
    tile_rows = tiles.tile_rows(x, 5) if sums else tiles.rows
    parts = cdiv(rows, tile_rows)
    partials = x.new_empty(parts, 2, columns, dtype=torch.float32) if sums else None
    launch(
        _average_backward, (parts * tiles.blocks,), x,
        grad, x, affine.scale, affine.shift, affine.mean, *(terms or (None, None)), out, partials,
        rows, columns // tiles.unit, grad.stride(0) // tiles.unit, x.stride(0) // tiles.unit,
        0 if out is None else out.stride(0) // tiles.unit, tile_rows,
        *geometry(pooling, space), **tiles.options,
    )  # fmt: skip
    return partials


def _window_sums(
    grad: Tensor,
    choice: Tensor | None,
    x: Tensor,
    affine: Affine,
    pooling: Pooling,
    space: Space,
    again: Tensor | None,
) -> Tensor:
    """Parts of the norm's sums, window by window; a `choice` is that of maxima."""
    rows, columns = grad.shape
    others = [other for other in (choice, again) if other is not None]
    tiles = tiling(1024, x, grad, *others)
    tile_rows = tiles.tile_rows(grad, 6)
    parts = cdiv(rows, tile_rows)
    partials = x.new_empty(parts, 2, columns, dtype=torch.float32)
    kernel = window_of(pooling)
    kind: tuple[Any, ...] = (_max_sums, choice)
    if choice is None:
        kind = (_average_sums, again, affine.scale, affine.shift)
    launch(
        kind[0], (parts * tiles.blocks,), x,
        grad, *kind[1:], x, affine.mean, partials, rows, columns // tiles.unit,
        grad.stride(0) // tiles.unit, x.stride(0) // tiles.unit, tile_rows,
        *geometry(pooling, space), KERNEL_H=kernel[0], KERNEL_W=kernel[1], **tiles.options,
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
    kernel, step = window_of(pooling), two(pooling.step)
    launch(
        _max_spread, (cdiv(rows, tiles.rows) * tiles.blocks,), x,
        grad, choice, x, affine.scale, affine.mean, *(terms or (None, None)), out,
        rows, columns // tiles.unit, grad.stride(0) // tiles.unit, x.stride(0) // tiles.unit,
        out.stride(0) // tiles.unit, *geometry(pooling, space),
        KERNEL_H=kernel[0], KERNEL_W=kernel[1],
        WINDOWS_H=cdiv(kernel[0], step[0]), WINDOWS_W=cdiv(kernel[1], step[1]),
        **tiles.options,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "grad_stride", "x_stride", "out_stride", "tile_rows", *GEOMETRY
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
    tile, c, inside = tile_of(columns * UNIT, COLUMNS)
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
        image, h, w = place_of(first, r - first, height, width)
        h, w = divide(h, step_h), divide(w, step_w)
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
        store_sums(partials, tile, columns * UNIT, c, inside, sum_g, sum_gx)


@triton.jit(
    do_not_specialize=["rows", "columns", "grad_stride", "x_stride", "tile_rows", *GEOMETRY]
)
def _average_sums(
    grad,  # [rows, C]
    again,  # [rows, C], becomes the averages; or None
    scale,  # [C]
    shift,  # [C]
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
    tile, c, inside = tile_of(columns * UNIT, COLUMNS)
    s = tl.load(scale + c, mask=inside, other=0.0)
    t = tl.load(shift + c, mask=inside, other=0.0)
    m = tl.load(mean + c, mask=inside, other=0.0)
    first = tile * tile_rows
    last = tl.minimum(first + tile_rows, rows)
    sum_g = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_gx = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        there = (r < last) & inside
        image, h, w = place_of(first, r - first, out_height, out_width)
        row = (image * height + h * step_h) * width + w * step_w
        at = grad + r.to(tl.int64) * (grad_stride * UNIT) + c
        g = tl.load(at, mask=there, other=0.0).to(tl.float32) * (1.0 / (KERNEL_H * KERNEL_W))
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        opened = tl.zeros([ROWS, COLUMNS], tl.float32)
        centers = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.static_range(KERNEL_H):
            for j in tl.static_range(KERNEL_W):
                at = x + (row + i * width + j).to(tl.int64) * (x_stride * UNIT) + c
                value = tl.load(at, mask=there, other=0.0)
                act = normalised(value, s, t).to(tl.float32)
                total += act
                shut = act <= 0  # NaN is not
                opened += tl.where(shut, 0.0, 1.0)
                centers += tl.where(shut, 0.0, value.to(tl.float32) - m)
        sum_g += g * opened
        sum_gx += g * centers
        if again is not None:
            total *= 1.0 / (KERNEL_H * KERNEL_W)
            at = again + r.to(tl.int64) * (columns * UNIT) + c
            tl.store(at, total.to(again.dtype.element_ty), mask=there)
    store_sums(partials, tile, columns * UNIT, c, inside, sum_g, sum_gx)


@triton.jit(
    do_not_specialize=["rows", "columns", "grad_stride", "x_stride", "tile_rows", *GEOMETRY]
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
    tile, c, inside = tile_of(columns * UNIT, COLUMNS)
    m = tl.load(mean + c, mask=inside, other=0.0)
    first = tile * tile_rows
    last = tl.minimum(first + tile_rows, rows)
    sum_g = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_gx = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        exists = r < last
        image, h, w = place_of(first, r - first, out_height, out_width)
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
    store_sums(partials, tile, columns * UNIT, c, inside, sum_g, sum_gx)


@triton.jit(
    do_not_specialize=["rows", "columns", "grad_stride", "x_stride", "out_stride", *GEOMETRY]
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
    tile, c, inside = tile_of(columns * UNIT, COLUMNS)
    offset = tl.arange(0, ROWS)[:, None]
    image, h, w = place_of(tile * ROWS, offset, height, width)
    r = tile * ROWS + offset
    exists = r < rows
    # Window o holds the places o * step - KERNEL // 2 and KERNEL - 1 more.
    last_h, last_w = divide(h + KERNEL_H // 2, step_h), divide(w + KERNEL_W // 2, step_w)
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
