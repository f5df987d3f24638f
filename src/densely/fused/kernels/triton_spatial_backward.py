"""Convolution over a window behind a norm and relu, in Triton: backward.

The input's gradient at a place is a sum over the window of output gradients, shifted the other way.
These are few columns wide (the growth rate), so they are gathered side by side for the kw shifts of
an image row: one product for each of the kh. The weight's gradient is a second kernel, which reads
the same gathered gradients against x, normalised again.
"""

# Kernels are written in Triton's language, which has no types that mypy could follow.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densely.fused.kernels.operands import Affine, Space
from densely.fused.kernels.triton_aside import Aside
from densely.fused.kernels.triton_launches import Choice, Step, fastest
from densely.fused.kernels.triton_tiles import (
    Columns,
    Window,
    cdiv,
    columns,
    exact,
    launch,
    loaded_total,
    masked_back,
    multiprocessors,
    next_power_of_2,
    normalised,
    place_of,
    precision,
    shared_memory,
    splits_for,
    upright,
    wide,
    window_of,
)


class _Launch(NamedTuple):
    """Tile of rows, channels, outputs; warps; loads in flight; places at a time; programs."""

    rows: int
    channels: int
    outputs: int
    warps: int
    stages: int
    together: int
    programs: int = 0


#: Rows, channels, warps, stages and programs that `densely bench --tune` tries.
INPUTS = (
    (64, 64, 4, 2, 0), (64, 128, 8, 2, 0), (128, 64, 8, 2, 0), (32, 64, 4, 2, 0), (64, 32, 4, 2, 0),
    (32, 64, 4, 2, 2), (32, 128, 8, 3, 1), (64, 64, 4, 1, 2), (64, 128, 8, 1, 0), (32, 64, 4, 3, 0),
    (64, 64, 4, 3, 0),
)  # fmt: skip
WEIGHTS = (
    (64, 128, 8, 3, 2), (64, 64, 8, 3, 2), (64, 64, 4, 3, 4), (64, 64, 4, 1, 4), (32, 128, 8, 3, 2),
    (64, 128, 8, 3, 1), (128, 64, 8, 3, 2),
)  # fmt: skip


def _input_launch(x: Tensor, outputs: int, window: Window, add_scaled: bool) -> _Launch:
    """With programs wanted it is of `_resident_kernel`: where all weights fit into its memory."""
    width = max(16, next_power_of_2(outputs))
    if exact(x):
        return _Launch(32, 32, 16, 4, 2, 1)
    if x.dtype == torch.float32:
        return _Launch(32, 64, min(width, 32), 4, 2, window.kw if window.kw <= 3 else 1)
    narrow, small = x.shape[1] <= 64, window.kh in (1, 3) and window.kw <= 3
    roomy = shared_memory(x.device) > 200_000  # 188 KB of weights and tiles: Hopper has them
    if width == 32 and small and roomy and not narrow and not add_scaled:
        return _Launch(32, 128, 32, 8, 3, window.kw, 1)
    together = window.kw if window.kw * min(width, 64) <= 256 else 1
    if x.shape[0] <= 32 * multiprocessors(x.device) and width <= 32:
        return _Launch(32, 64, width, 4, 2, together)
    if width <= 32 and small and x.stride(0) % 2 == 0:  # else addresses take too many registers
        return _Launch(64, 64, width, 4, 1, together, 2)
    if width <= 32:
        return _Launch(64, 64, width, 4, 2, together)
    return _Launch(64, 64 if narrow else 128, 64, 8, 2, together)


def _weight_launch(x: Tensor, outputs: int, window: Window) -> _Launch:
    width = max(16, next_power_of_2(outputs))
    if exact(x):
        return _Launch(16, 32, min(width, 32), 4, 2, 1, 4)
    if x.dtype == torch.float32:
        together = window.kw if window.kw <= 3 else 1
        return _Launch(32, 64, min(width, 32), 8, 2, together, 2)
    width = min(width, 64)
    together = window.kw if window.kw * width <= 256 else 1
    side = next_power_of_2(together) * width
    if side <= 128 and x.shape[1] <= 64:
        return _Launch(64, 64, width, 4, 3, together, 4)
    programs = 1 if x.shape[0] <= 128 * multiprocessors(x.device) else 2
    return _Launch(64, 128 if side <= 128 else 64, width, 8, 3, together, programs)


def backward(
    grad: Tensor,
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    dilation: int,
    space: Space,
    needs_weight: bool,
    total: Tensor,
    base: Tensor | None,
    add_scaled: bool,
    aside: Aside | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Back through `triton_spatial.forward`: g is the normalised x's gradient, where that is > 0.

    Args:
        grad: [rows, O], contiguous.
        x: as in forward.
        affine: as in forward.
        weight: as in forward.
        dilation: as in forward.
        space: as in forward.
        needs_weight: whether to make the weight's gradient.
        total: [rows, C]; becomes g, or with `add_scaled` (base or else total) + scale * g.
        base: [rows, C] or None.
        add_scaled: see `total`.
        aside: where to make the weight's gradient, if given.

    Returns:
        Parts of the weight's gradient, [splits, O, kh, kw, C] in float32, which are there when
        `aside` is waited for; [parts, 2, C]: sums of g and of g * (x - mean) over sets of rows that
        together are all rows.
    """
    (rows, channels), outputs = x.shape, weight.shape[0]
    window = window_of(weight, dilation, space)
    cols = columns(x, total, base)

    def of_input(tile: _Launch) -> tuple[Tensor, Callable[[], None]]:
        tiles, across = cdiv(rows, tile.rows), cdiv(channels, tile.channels)
        kernel, grid, parts = _input_kernel, (across * tiles, 1), tiles
        resident: dict[str, int] = {}
        if tile.programs:
            parts = splits_for(x, tiles, across, tile.programs)
            kernel, grid, resident = _resident_kernel, (across, parts), {"STAGES": tile.stages}
        norm_parts = x.new_empty(parts, 2, channels, dtype=torch.float32)
        return norm_parts, lambda: launch(
            kernel, grid, x,
            grad, x, affine.scale, affine.shift, affine.mean, window.weight, total, base,
            norm_parts, rows, channels // cols.unit, cols.read // cols.read_unit,
            x.stride(0) // cols.row_unit, total.stride(0) // cols.row_unit,
            0 if base is None else base.stride(0) // cols.row_unit, window.height, window.width,
            **_constants(cols, tile, window, rows, outputs, dilation),
            ADD=add_scaled, PRECISION=precision(x), **resident,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    usual = _input_launch(x, outputs, window, add_scaled)

    def choice() -> Choice[_Launch, Tensor]:
        fits = window.kh in (1, 3) and usual.together == window.kw and outputs <= usual.outputs
        others = (
            _Launch(*tile[:2], usual.outputs, *tile[2:4], usual.together, tile[4])
            for tile in INPUTS
            if fits or not tile[4]
        )
        step = Step("spatial input", x, outputs, (window.kh, window.kw, dilation, add_scaled))
        return Choice(step, usual, others, _summed(of_input), lambda sums: [total, sums], total)

    norm_parts, run_input = of_input(fastest(x, usual, choice))
    if not needs_weight:
        run_input()
        return None, norm_parts
    weight_parts, run_weight = _weight_gradient(grad, x, affine, window, dilation)
    if aside is not None:
        aside.run(run_weight)
    run_input()
    if aside is None:
        run_weight()
    return weight_parts, norm_parts


def _weight_gradient(
    grad: Tensor, x: Tensor, affine: Affine, window: Window, dilation: int
) -> tuple[Tensor, Callable[[], None]]:
    """Its parts, and what makes them."""
    (rows, channels), outputs = x.shape, grad.shape[1]
    cols = columns(x)

    def prepared(tile: _Launch) -> tuple[Tensor, Callable[[], None]]:
        groups = window.kh * (window.kw // tile.together)
        across = groups * cdiv(outputs, tile.outputs), cdiv(channels, tile.channels)
        splits = splits_for(x, cdiv(rows, tile.rows), across[0] * across[1], tile.programs)
        parts = x.new_empty(splits, *window.weight.shape, dtype=torch.float32)
        return parts, lambda: launch(
            _weight_kernel, (*across, splits), x,
            grad, x, affine.scale, affine.shift, parts, rows, channels // cols.unit,
            cols.read // cols.read_unit, x.stride(0) // cols.row_unit, window.height, window.width,
            **_constants(cols, tile, window, rows, outputs, dilation), PRECISION=precision(x),
            STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    usual = _weight_launch(x, outputs, window)

    def choice() -> Choice[_Launch, Tensor]:
        others = (
            _Launch(*tile[:2], usual.outputs, *tile[2:4], usual.together, tile[4])
            for tile in WEIGHTS
        )
        step = Step("spatial weight", x, outputs, (window.kh, window.kw, dilation))
        return Choice(step, usual, others, _summed(prepared), lambda sums: [sums])

    return prepared(fastest(x, usual, choice))


def _summed(
    prepared: Callable[[_Launch], tuple[Tensor, Callable[[], None]]],
) -> Callable[[_Launch], Tensor]:
    """What runs a launch that is prepared, and adds up the parts it makes."""

    def summed(tile: _Launch) -> Tensor:
        parts, run = prepared(tile)
        run()
        return parts.sum(0)

    return summed


def _constants(
    cols: Columns, tile: _Launch, window: Window, rows: int, outputs: int, dilation: int
) -> dict[str, int]:
    """What these kernels are compiled for."""
    return {
        "UNIT": cols.unit, "READ_UNIT": cols.read_unit, "ROW_UNIT": cols.row_unit,
        "OUT": outputs, "KH": window.kh, "KW": window.kw, "DILATION": dilation,
        "TOGETHER": tile.together, "SIDE": next_power_of_2(tile.together),
        "EVEN": rows % tile.rows == 0, "BM": tile.rows, "BC": tile.channels, "BO": tile.outputs,
    }  # fmt: skip


@triton.jit
def _gathered(
    grad, group, first, index, row_mask, at_h, at_w, height, width, side, outputs,
    OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Output gradients that places have had a part in, [BM, SIDE * BO], for one group.

    The places are those from `first` on, by `index` [BM].
    """
    kh = group // (KW // TOGETHER)
    kw = (group % (KW // TOGETHER)) * TOGETHER + side
    down = (kh - KH // 2) * DILATION
    right = (kw - KW // 2) * DILATION
    h, w = at_h - down, at_w[:, None] - right[None, :]
    mask = (row_mask & (h >= 0) & (h < height))[:, None] & (w >= 0) & (w < width)
    mask &= ((outputs < OUT) & (side < TOGETHER))[None, :]
    source = grad + (first - down * width) * OUT
    at = index[:, None] * OUT + (outputs - right * OUT)[None, :]
    return tl.load(source + at, mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "rows", "c_units", "read_units", "x_units", "total_units", "base_units", "height", "width"
    ]
)  # fmt: skip
def _input_kernel(
    grad, x, scale, shift, mean, weight, total, base, norm_parts, rows, c_units, read_units,
    x_units, total_units, base_units, height, width, UNIT: tl.constexpr, READ_UNIT: tl.constexpr,
    ROW_UNIT: tl.constexpr, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DILATION: tl.constexpr, TOGETHER: tl.constexpr, SIDE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = KH * (KW // TOGETHER)
    C, read, x_row = c_units * UNIT, read_units * READ_UNIT, x_units * ROW_UNIT
    across = tl.cdiv(C, BC)
    tile = tl.program_id(0) // across
    cols = (tl.program_id(0) % across) * BC + tl.arange(0, BC)
    col_mask = cols < C
    index = tl.arange(0, BM)
    row_mask, first = (tile * BM + index < rows) | EVEN, wide(tile) * BM
    _image, at_h, at_w = place_of(tile * BM, index, height, width)
    mask = row_mask[None, :] & col_mask[:, None]
    values = tl.load(upright(x, first, index, x_row, cols),
                     mask=row_mask[None, :] & (cols < read)[:, None], other=0.0)  # fmt: skip
    before = loaded_total(total, base, first, index, total_units * ROW_UNIT, base_units * ROW_UNIT,
                          cols, mask, ADD)  # fmt: skip
    # Asked for before the products, whose barriers no load is moved across.
    scales = tl.load(scale + cols, mask=col_mask, other=0.0)
    shifts = tl.load(shift + cols, mask=col_mask, other=0.0)
    means = tl.load(mean + cols, mask=col_mask, other=0.0)
    side, output = tl.arange(0, SIDE * BO) // BO, tl.arange(0, SIDE * BO) % BO
    back = tl.zeros((BC, BM), tl.float32)
    for step in range(0, GROUPS * tl.cdiv(OUT, BO)):
        group = step % GROUPS
        outputs = (step // GROUPS) * BO + output
        g = _gathered(grad, group, first, index, row_mask, at_h, at_w, height, width, side, outputs,
                      OUT, KH, KW, DILATION, TOGETHER)  # fmt: skip
        tap = outputs * (KH * KW) + group * TOGETHER + side
        w = tl.load(weight + tap[None, :] * C + cols[:, None],
                    mask=((outputs < OUT) & (side < TOGETHER))[None, :] & col_mask[:, None],
                    other=0.0)  # fmt: skip
        back = tl.dot(w, tl.trans(g), back, input_precision=PRECISION)
    _act, sum_g, sum_gx = masked_back(
        back, values, scales, shifts, means, before, total, first, index, total_units * ROW_UNIT,
        cols, mask, ADD,
    )  # fmt: skip
    at = norm_parts + tile.to(tl.int64) * 2 * C + cols
    tl.store(at, sum_g, mask=col_mask)
    tl.store(at + C, sum_gx, mask=col_mask)


@triton.jit
def _taps(
    weight, kh, side, outputs, cols, C, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr
):
    """Weights of an image row of the window, [channels, SIDE * BO]."""
    tap = (outputs * KH + kh) * KW + side
    mask = ((outputs < OUT) & (side < KW))[None, :] & (cols < C)[:, None]
    return tl.load(weight + tap[None, :] * C + cols[:, None], mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "rows", "c_units", "read_units", "x_units", "total_units", "base_units", "height", "width"
    ]
)  # fmt: skip
def _resident_kernel(
    grad, x, scale, shift, mean, weight, total, base, norm_parts, rows, c_units, read_units,
    x_units, total_units, base_units, height, width, UNIT: tl.constexpr, READ_UNIT: tl.constexpr,
    ROW_UNIT: tl.constexpr, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DILATION: tl.constexpr, TOGETHER: tl.constexpr, SIDE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`_input_kernel` for windows 1 or 3 high: all weights stay in shared memory."""
    C, read, x_row = c_units * UNIT, read_units * READ_UNIT, x_units * ROW_UNIT
    split = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    col_mask = cols < C
    side, outputs = tl.arange(0, SIDE * BO) // BO, tl.arange(0, SIDE * BO) % BO
    scales = tl.load(scale + cols, mask=col_mask, other=0.0)
    shifts = tl.load(shift + cols, mask=col_mask, other=0.0)
    means = tl.load(mean + cols, mask=col_mask, other=0.0)
    w0 = _taps(weight, 0, side, outputs, cols, C, OUT, KH, KW)
    if KH == 3:
        w1 = _taps(weight, 1, side, outputs, cols, C, OUT, KH, KW)
        w2 = _taps(weight, 2, side, outputs, cols, C, OUT, KH, KW)
    sum_g, sum_gx = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    index = tl.arange(0, BM)
    for tile in tl.range(split, tl.cdiv(rows, BM), tl.num_programs(1), num_stages=STAGES):
        row_mask, first = (tile * BM + index < rows) | EVEN, wide(tile) * BM
        _image, at_h, at_w = place_of(tile * BM, index, height, width)
        mask = row_mask[None, :] & col_mask[:, None]
        values = tl.load(upright(x, first, index, x_row, cols),
                         mask=row_mask[None, :] & (cols < read)[:, None], other=0.0)  # fmt: skip
        before = loaded_total(total, base, first, index, total_units * ROW_UNIT,
                              base_units * ROW_UNIT, cols, mask, ADD)  # fmt: skip
        g = _gathered(grad, 0, first, index, row_mask, at_h, at_w, height, width, side,
                      outputs, OUT, KH, KW, DILATION, TOGETHER)  # fmt: skip
        back = tl.dot(w0, tl.trans(g), input_precision=PRECISION)
        if KH == 3:
            g = _gathered(grad, 1, first, index, row_mask, at_h, at_w, height, width, side,
                          outputs, OUT, KH, KW, DILATION, TOGETHER)  # fmt: skip
            back = tl.dot(w1, tl.trans(g), back, input_precision=PRECISION)
            g = _gathered(grad, 2, first, index, row_mask, at_h, at_w, height, width, side,
                          outputs, OUT, KH, KW, DILATION, TOGETHER)  # fmt: skip
            back = tl.dot(w2, tl.trans(g), back, input_precision=PRECISION)
        _act, more_g, more_gx = masked_back(
            back, values, scales, shifts, means, before, total, first, index,
            total_units * ROW_UNIT, cols, mask, ADD,
        )  # fmt: skip
        sum_g += more_g
        sum_gx += more_gx
    at = norm_parts + split.to(tl.int64) * 2 * C + cols
    tl.store(at, sum_g, mask=col_mask)
    tl.store(at + C, sum_gx, mask=col_mask)


@triton.jit(do_not_specialize=["rows", "c_units", "read_units", "x_units", "height", "width"])
def _weight_kernel(
    grad, x, scale, shift, parts, rows, c_units, read_units, x_units, height, width,
    UNIT: tl.constexpr, READ_UNIT: tl.constexpr, ROW_UNIT: tl.constexpr, OUT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, TOGETHER: tl.constexpr,
    SIDE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = KH * (KW // TOGETHER)
    C, read, x_row = c_units * UNIT, read_units * READ_UNIT, x_units * ROW_UNIT
    group, split = tl.program_id(0) % GROUPS, tl.program_id(2)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    col_mask = cols < C
    side = tl.arange(0, SIDE * BO) // BO
    outputs = (tl.program_id(0) // GROUPS) * BO + tl.arange(0, SIDE * BO) % BO
    scales = tl.load(scale + cols, mask=col_mask, other=0.0)
    shifts = tl.load(shift + cols, mask=col_mask, other=0.0)
    grad_w = tl.zeros((BC, SIDE * BO), tl.float32)
    index = tl.arange(0, BM)
    for tile in tl.range(split, tl.cdiv(rows, BM), tl.num_programs(2), num_stages=STAGES):
        row_mask, first = (tile * BM + index < rows) | EVEN, wide(tile) * BM
        _image, at_h, at_w = place_of(tile * BM, index, height, width)
        values = tl.load(upright(x, first, index, x_row, cols),
                         mask=row_mask[None, :] & (cols < read)[:, None], other=0.0)  # fmt: skip
        act = normalised(values, scales[:, None], shifts[:, None])
        g = _gathered(grad, group, first, index, row_mask, at_h, at_w, height, width, side, outputs,
                      OUT, KH, KW, DILATION, TOGETHER)  # fmt: skip
        grad_w = tl.dot(act, g, grad_w, input_precision=PRECISION)
    tap = outputs * (KH * KW) + group * TOGETHER + side
    at = parts + (split.to(tl.int64) * (OUT * KH * KW) + tap[None, :]) * C + cols[:, None]
    mask = ((outputs < OUT) & (side < TOGETHER))[None, :] & col_mask[:, None]
    tl.store(at, grad_w, mask=mask)
