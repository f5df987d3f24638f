"""Convolution over a window behind a norm and relu, in Triton: forward.

A window of kh x 3 places is kh shifts by image rows, times 3 shifts within a row. A program reads
its rows once for each of the kh, normalises them, and multiplies them with the weights of all 3 at
a time: products side by side, each for its place in the window, which then are moved by a row of
the tile against each other and added up. So x is normalised kh times, not kh * 3 times, and a
product is as wide as tensor cores like it.

The price is a rim of rows that a program makes only for its neighbours within the tile: a tile of
BM rows gives BM - 2 * rim outputs. Where dilation makes the rim too large, and for other windows,
each place is taken by itself. The gradients are in `triton_spatial_backward`.
"""

# Kernels are written in Triton's language, which has no types that mypy could follow.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densely.fused.kernels import triton_library
from densely.fused.kernels.operands import Affine, Space
from densely.fused.kernels.triton_launches import Choice, Step, fastest, moments_of
from densely.fused.kernels.triton_spatial_backward import backward
from densely.fused.kernels.triton_tiles import (
    Window,
    cdiv,
    columns,
    exact,
    launch,
    multiprocessors,
    next_power_of_2,
    normalised,
    place_of,
    precision,
    shared_memory,
    store_moments,
    window_of,
)

__all__ = ["backward", "forward"]


class _Launch(NamedTuple):
    """Tile of rows, channels, outputs; warps of a program; loads in flight; places at a time.

    `registers` caps those of a thread, so that two programs fit on a processor; None caps nothing.
    """

    rows: int
    channels: int
    outputs: int
    warps: int
    stages: int
    together: int
    registers: int | None = None


#: No launch of the kernel.
LIBRARY = _Launch(0, 0, 0, 0, 0, 0)
#: Rows, channels, warps, stages and registers that `densely bench --tune` tries.
FORWARDS = (
    (128, 32, 8, 2, 128), (128, 32, 8, 3, 128), (128, 64, 8, 1, 128), (256, 32, 8, 2, None),
    (64, 32, 4, 2, 128), (64, 32, 4, 2, None), (64, 64, 4, 2, None), (64, 64, 4, 1, 128),
    (32, 32, 4, 2, None), (32, 64, 4, 2, None), (32, 64, 4, 1, None),
)  # fmt: skip


def _forward_launch(x: Tensor, outputs: int, window: Window) -> _Launch:
    width = max(16, next_power_of_2(outputs))
    if exact(x):
        return _Launch(64, 16, min(width, 32), 4, 2, 1)
    together = 3 if window.kw == 3 and window.rim <= 8 else 1
    if x.dtype == torch.float32:
        return _Launch(64, 32, min(width, 32), 4, 2, together)
    width = min(width, 64)
    share = x.shape[0] / multiprocessors(x.device)  # rows of each
    many = share >= 320
    registers = None if x.stride(0) % 2 else 128  # addresses of odd rows take more
    if width == 64:  # of the weights of all image rows too much for `_turn`
        channels = 32 if 0 < x.shape[1] % 64 <= 32 else 64  # fewer that are not there
        return _Launch(64, channels, 64, 8 if many else 4, 3, together, registers)
    if share <= 72:
        return _Launch(32, 32, width, 4, 2, together)
    if x.shape[1] <= 64 and width == 16:
        return _Launch(64, 64, width, 4, 1, together)
    tall, warps = (128, 8) if many else (64, 4)
    return _Launch(tall, 32, width, warps, 2, together, registers)


def _turn(x: Tensor, tile: _Launch, window: Window) -> int:
    """Image rows of the window that a turn of the loop takes: all, where two programs have room."""
    if tile.together == 1:
        return 1
    values = tile.stages * window.kh * tile.channels * (tile.rows + 4 * tile.outputs)
    return window.kh if 2 * values * x.element_size() <= shared_memory(x.device) else 1


def forward(
    x: Tensor,
    affine: Affine | None,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    space: Space,
    out: Tensor,
    want_moments: bool,
) -> tuple[Tensor, int] | None:
    """Convolution of relu(x * scale + shift), padded with zeros to keep the size, plus bias.

    Args:
        x: [rows, C]; rows may be further apart than they are long.
        affine: vectors of float32; None for an x that has been through its norm and relu.
        weight: [O, C, kh, kw] or [O, C, kw], odd sizes. Read without a copy if its memory is in
            channels-last order.
        bias: [O].
        dilation: of all axes.
        space: of x, with one or two axes.
        out: [rows, O], as x.
        want_moments: whether to take the moments of the columns of `out`.

    Returns:
        Mean and sum of squared differences from it of each tile of rows, [tiles, 2, O] in float32,
        and the rows of a tile.
    """
    window = window_of(weight, dilation, space)
    bias = None if bias is None else bias.contiguous()
    rows, outputs = out.shape
    cols = columns(x)
    scale, shift = (None, None) if affine is None else (affine.scale, affine.shift)

    def run(tile: _Launch) -> tuple[Tensor, int] | None:
        if tile == LIBRARY:
            return triton_library.spatial(
                x, affine, weight, bias, dilation, space, out, want_moments
            )
        rim = window.rim if tile.together > 1 else 0
        tile_rows = tile.rows - 2 * rim
        tiles = cdiv(rows, tile_rows)
        parts = x.new_empty(tiles, 2, outputs, dtype=torch.float32) if want_moments else None
        launch(
            _forward_kernel, (cdiv(outputs, tile.outputs) * tiles,), x,
            x, scale, shift, window.weight, bias, out, parts, rows,
            x.shape[1] // cols.unit, cols.read // cols.read_unit, x.stride(0) // cols.row_unit,
            out.stride(0), window.height, window.width, UNIT=cols.unit, READ_UNIT=cols.read_unit,
            ROW_UNIT=cols.row_unit, BEYOND=cols.read > x.shape[1], OUT=outputs, KH=window.kh,
            KW=window.kw, DILATION=dilation, RIM=rim, TOGETHER=tile.together,
            TURN=_turn(x, tile, window), SIDE=4 if tile.together > 1 else 1, BM=tile.rows,
            BC=tile.channels, BO=tile.outputs, PRECISION=precision(x),
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
        return None if parts is None else (parts, tile_rows)

    usual = _forward_launch(x, outputs, window)

    def choice() -> Choice[_Launch, tuple[Tensor, int] | None]:
        tiles = (
            _Launch(*tile[:2], usual.outputs, *tile[2:4], usual.together, tile[4])
            for tile in FORWARDS
            if tile[0] > 2 * window.rim
        )
        # The library may round float32 where this may not.
        others = chain(tiles, () if exact(x) else (LIBRARY,))
        more = (window.kh, window.kw, dilation, want_moments, affine is not None)
        step = Step("spatial forward", x, outputs, more)
        return Choice(step, usual, others, run, lambda taken: [out, *moments_of(taken, rows)])

    return run(fastest(x, usual, choice))


@triton.jit
def _moved(tile, by: tl.constexpr, at_w, width, BM: tl.constexpr, BO: tl.constexpr):
    """Row r of the result is row r + by of the tile, or zero where that is in no image row."""
    rows = tl.minimum(tl.maximum(tl.arange(0, BM) + by, 0), BM - 1)
    moved = tl.gather(tile, tl.broadcast_to(rows[:, None], (BM, BO)), axis=0)
    there = at_w + by
    return tl.where(((there >= 0) & (there < width))[:, None], moved, 0.0)


@triton.jit(do_not_specialize=["rows", "c_units", "read_units", "x_units", "height", "width"])
def _forward_kernel(
    x, scale, shift, weight, bias, out, parts, rows, c_units, read_units, x_units, out_row, height,
    width, UNIT: tl.constexpr, READ_UNIT: tl.constexpr, ROW_UNIT: tl.constexpr,
    BEYOND: tl.constexpr, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DILATION: tl.constexpr, RIM: tl.constexpr, TOGETHER: tl.constexpr, TURN: tl.constexpr,
    SIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = KH * (KW // TOGETHER)  # shifts of x
    C, read, x_row = c_units * UNIT, read_units * READ_UNIT, x_units * ROW_UNIT
    ACROSS: tl.constexpr = (OUT + BO - 1) // BO
    tile, first = tl.program_id(0) // ACROSS, (tl.program_id(0) % ACROSS) * BO
    start, index = tile * (BM - 2 * RIM), tl.arange(0, BM)
    places = start - RIM + index
    inside = (places >= 0) & (places < rows)
    _image, at_h, at_w = place_of(start - RIM, index, height, width)
    # Columns of the products: side by side for each kw of a group, O of them and some empty ones.
    side = tl.arange(0, SIDE * BO) // BO
    outputs = first + tl.arange(0, SIDE * BO) % BO
    out_there = (outputs < OUT) & (side < TOGETHER)
    acc = tl.zeros((BM, SIDE * BO), tl.float32)
    for step in range(0, GROUPS // TURN * tl.cdiv(C, BC)):
        cols = (step // (GROUPS // TURN)) * BC + tl.arange(0, BC)
        if scale is not None:
            scales = tl.load(scale + cols, mask=cols < C, other=0.0)
            shifts = tl.load(shift + cols, mask=cols < C, other=0.0)
        at_x = index[:, None] * x_row + cols[None, :]
        for part in tl.static_range(TURN):
            group = step % (GROUPS // TURN) * TURN + part
            kh = group // (KW // TOGETHER)
            kw = (group % (KW // TOGETHER)) * TOGETHER
            down = (kh - KH // 2) * DILATION
            right = 0 if TOGETHER > 1 else (kw - KW // 2) * DILATION
            row_mask = inside & (at_h + down >= 0) & (at_h + down < height)
            row_mask &= (at_w + right >= 0) & (at_w + right < width)
            source = (start - RIM + down * width + right).to(tl.int64) * x_row
            act = tl.load(x + source + at_x, mask=row_mask[:, None] & (cols < read)[None, :],
                          other=0.0)  # fmt: skip
            if scale is not None:
                # Zero padding comes after norm and relu: beside the maps x and the shift are zero.
                shift_there = tl.where(row_mask[:, None], shifts[None, :], 0.0)
                act = normalised(act, scales[None, :], shift_there)
            if BEYOND:  # columns beyond C may hold anything
                act = tl.where((cols < C)[None, :], act, 0.0)
            tap = (outputs * KH + kh) * KW + kw + side
            w = tl.load(weight + (tap[None, :] * C + cols[:, None]),
                        mask=out_there[None, :] & (cols < C)[:, None], other=0.0)  # fmt: skip
            acc = tl.dot(act, w, acc, input_precision=PRECISION)
    if TOGETHER > 1:
        # Only the outer two move. The layout of products has all kw of an output in one thread.
        pairs = tl.reshape(tl.permute(tl.reshape(acc, (BM, 4, BO)), (0, 2, 1)), (BM, BO, 2, 2))
        even, odd = tl.split(pairs)
        left, right_of = tl.split(even)
        acc, _none = tl.split(odd)
        acc += _moved(left, -DILATION, at_w, width, BM, BO)
        acc += _moved(right_of, DILATION, at_w, width, BM, BO)
    outputs = first + tl.arange(0, BO)
    out_mask = outputs < OUT
    if bias is not None:
        acc += tl.load(bias + outputs, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    result = acc.to(out.dtype.element_ty)
    own = inside & (index >= RIM) & (index < BM - RIM)
    at = out + places.to(tl.int64)[:, None] * out_row + outputs[None, :]
    tl.store(at, result, mask=own[:, None] & out_mask[None, :])
    if parts is not None:
        count = tl.minimum(rows - start, BM - 2 * RIM).to(tl.float32)
        store_moments(result.to(tl.float32), own, count, parts, tile, outputs, OUT, out_mask)
