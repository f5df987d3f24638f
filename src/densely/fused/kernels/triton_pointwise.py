"""1x1 convolution behind a norm and relu, in Triton: products of matrices with a prologue.

Forward reads x once: a program makes a tile of rows times up to 128 outputs, and their moments
from the same registers; or, where nothing is kept for backward, puts them through the next norm and
relu. Backward reads x and what has its shape once as well: a program owns a tile of channels, keeps
its weights, and walks over row tiles; each gives the input's gradient, masked, the sums that the
norm wants and its share of the weight's gradient, which stays in registers.
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
from densely.fused.kernels.operands import Affine, Pending
from densely.fused.kernels.triton_launches import Choice, Step, fastest, moments_of
from densely.fused.kernels.triton_tiles import (
    arriving,
    cdiv,
    columns,
    exact,
    formed,
    launch,
    loaded_total,
    masked_back,
    multiprocessors,
    next_power_of_2,
    normalised,
    precision,
    shared_memory,
    splits_for,
    upright,
    wide,
)

#: Of x that a program of `backward` works on.
CHANNELS = 64


class _Launch(NamedTuple):
    """Tile of rows, channels and outputs; warps of a program; loads in flight; programs wanted.

    `registers` caps those of a thread; None caps nothing.
    """

    rows: int
    channels: int
    outputs: int
    warps: int
    stages: int
    programs: int = 0
    registers: int | None = None


#: No launch of the kernel.
LIBRARY = _Launch(0, 0, 0, 0, 0)
#: Rows, channels, warps and stages that `densely bench --tune` tries.
FORWARDS = (
    (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 4), (128, 32, 8, 4), (128, 64, 4, 3),
    (64, 64, 4, 1), (128, 64, 8, 1), (128, 64, 8, 3), (32, 64, 4, 3), (64, 128, 4, 3),
)  # fmt: skip
#: Rows, channels, warps, stages, programs and registers.
BACKWARDS = (
    (64, 64, 4, 2, 2, None), (64, 64, 4, 3, 2, None), (64, 64, 4, 1, 3, 168),
    (32, 64, 4, 3, 2, None), (32, 64, 4, 2, 3, 168), (64, 128, 8, 2, 1, None),
    (64, 128, 8, 3, 1, None), (128, 64, 8, 3, 1, None),
)  # fmt: skip


def _forward_launch(x: Tensor, outputs: int) -> _Launch:
    width = max(16, next_power_of_2(outputs))
    if exact(x):
        return _Launch(64, 16, min(width, 64), 4, 2)
    if x.dtype == torch.float32:
        return _Launch(64, 32, min(width, 64), 4, 3)
    share = x.shape[0] / multiprocessors(x.device)  # rows of each
    if share >= 128 * 32 and width >= 128:
        return _Launch(64, 32, 128, 4, 4)
    if share >= 128 and width <= 64:
        return _Launch(64, 64, width, 4, 1)
    return _Launch(128 if share >= 128 * 8 else 64, 64, min(width, 128), 4, 3)


def _backward_launch(x: Tensor, outputs: int, pending: bool) -> _Launch:
    width = max(16, next_power_of_2(outputs))
    if exact(x):
        return _Launch(32, 32, 16, 4, 2, 4)
    roomy = shared_memory(x.device) > 120_000
    if x.dtype == torch.float32:
        return _Launch(32, CHANNELS, min(width, 128), 8, 2 if roomy else 1, 1)
    if not pending or width <= 64:
        return _Launch(64, CHANNELS, min(width, 128), 4, 3, 2)
    # What a pending gradient is formed from takes the memory of a turn that is loaded ahead.
    if roomy and CHANNELS < x.shape[1] <= 2 * CHANNELS:
        return _Launch(64, 2 * CHANNELS, 128, 8, 2, 1)
    return _Launch(64, CHANNELS, 128, 4, 2, 2)


def wants_formed(x: Tensor, outputs: int) -> bool:
    """Whether `backward` is faster if a launch before it forms a pending gradient.

    The programs that share a tile of rows form it each for itself, which is cheaper for a few.
    """
    return x.shape[1] > CHANNELS * (2 if outputs > 64 else 6)


def _weight_launch(x: Tensor) -> _Launch:
    if exact(x):
        return _Launch(16, 32, 32, 4, 2, 4)
    return _Launch(32 if x.dtype == torch.float32 else 64, 64, 128, 8, 2, 2)


def forward(
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    want_moments: bool,
    after: Affine | None = None,
) -> tuple[Tensor, int] | None:
    """Relu(x * scale + shift) @ weight.T + bias, [rows, C] to `out` [rows, O].

    Args:
        x: rows may be further apart than they are long.
        affine: vectors of float32.
        weight: [O, C].
        bias: [O].
        out: as x.
        want_moments: whether to take the moments of the columns of `out`.
        after: the norm of what reads `out`, [O], which is then normalised and without what is
            below zero; rounded once.

    Returns:
        Mean and sum of squared differences from it of each tile of rows, [tiles, 2, O] in float32,
        and the rows of a tile.
    """
    rows, outputs = out.shape
    cols, weight = columns(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    after_scale, after_shift = (None, None) if after is None else (after.scale, after.shift)

    def run(tile: _Launch) -> tuple[Tensor, int] | None:
        if tile == LIBRARY:
            return triton_library.pointwise(x, affine, weight, bias, out, want_moments, after)
        tiles = cdiv(rows, tile.rows)
        parts = x.new_empty(tiles, 2, outputs, dtype=torch.float32) if want_moments else None
        launch(
            _forward_kernel, (cdiv(outputs, tile.outputs) * tiles,), x,
            x, affine.scale, affine.shift, weight, bias, after_scale, after_shift, out, parts, rows,
            x.shape[1] // cols.unit, cols.read // cols.read_unit, x.stride(0) // cols.row_unit,
            out.stride(0), UNIT=cols.unit, READ_UNIT=cols.read_unit, ROW_UNIT=cols.row_unit,
            BEYOND=cols.read > x.shape[1], EVEN=rows % tile.rows == 0, OUT=outputs, BM=tile.rows,
            BC=tile.channels, BO=tile.outputs, PRECISION=precision(x),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return None if parts is None else (parts, tile.rows)

    usual = _forward_launch(x, outputs)

    def choice() -> Choice[_Launch, tuple[Tensor, int] | None]:
        step = Step("pointwise forward", x, outputs, (want_moments, after is not None))
        tiles = (_Launch(*tile[:2], usual.outputs, *tile[2:]) for tile in FORWARDS)
        # The library may round float32 where this may not.
        others = chain(tiles, () if exact(x) else (LIBRARY,))
        return Choice(step, usual, others, run, lambda taken: [out, *moments_of(taken, rows)])

    return run(fastest(x, usual, choice))


def backward(
    grad: Tensor | Pending,
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    needs_weight: bool,
    total: Tensor,
    base: Tensor | None,
    add_scaled: bool,
) -> tuple[Tensor | None, Tensor]:
    """Back through `forward`: g is (grad @ weight) where the normalised x is above zero, else 0.

    Args:
        grad: [rows, O]; a pending one is formed while it is read.
        x: as in `forward`.
        affine: as in `forward`.
        weight: [O, C].
        needs_weight: whether to make the weight's gradient.
        total: [rows, C]; becomes g, or with `add_scaled` (base or else total) + scale * g.
        base: [rows, C] or None.
        add_scaled: see `total`.

    Returns:
        Parts of the weight's gradient, [splits, O, C] in float32; [parts, 2, C]: sums of g and of
        g * (x - mean) over sets of rows that together are all rows.
    """
    (rows, channels), outputs = x.shape, weight.shape[0]
    cols, weight = columns(x, total, base), weight.contiguous()
    grads = arriving(grad)

    def run(tile: _Launch) -> tuple[Tensor | None, Tensor]:
        tiles, across = cdiv(rows, tile.rows), cdiv(channels, tile.channels)
        splits = splits_for(x, tiles, across, tile.programs)
        norm_parts = x.new_empty(splits, 2, channels, dtype=torch.float32)
        in_passing = needs_weight and outputs <= tile.outputs
        weight_parts = (
            x.new_empty(splits, outputs, channels, dtype=torch.float32) if in_passing else None
        )
        launch(
            _backward_kernel, (across, splits), x,
            *grads, x, affine.scale, affine.shift, affine.mean, weight, total, base,
            weight_parts, norm_parts, rows, channels // cols.unit, cols.read // cols.read_unit,
            *grads.rows, x.stride(0) // cols.row_unit, total.stride(0) // cols.row_unit,
            0 if base is None else base.stride(0) // cols.row_unit,
            UNIT=cols.unit, READ_UNIT=cols.read_unit, ROW_UNIT=cols.row_unit, OUT=outputs,
            EVEN=rows % tile.rows == 0, BM=tile.rows, BC=tile.channels, BO=tile.outputs,
            ADD=add_scaled, PRECISION=precision(x),
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
        return weight_parts, norm_parts

    usual = _backward_launch(x, outputs, grads.gx is not None)

    def summed(tile: _Launch) -> list[Tensor]:
        return [parts.sum(0) for parts in run(tile) if parts is not None]

    def choice() -> Choice[_Launch, list[Tensor]]:
        more = (needs_weight, add_scaled, grads.gx is not None)
        others = (_Launch(*tile[:2], usual.outputs, *tile[2:]) for tile in BACKWARDS)
        step = Step("pointwise backward", x, outputs, more)
        return Choice(step, usual, others, summed, lambda sums: [total, *sums], total)

    weight_parts, norm_parts = run(fastest(x, usual, choice))
    if needs_weight and weight_parts is None:
        weight_parts = _weight_gradient(grad, x, affine, outputs)
    return weight_parts, norm_parts


def _weight_gradient(grad: Tensor | Pending, x: Tensor, affine: Affine, outputs: int) -> Tensor:
    """Parts of the weight's gradient, where it does not fit into the registers of `backward`."""
    rows, channels = x.shape
    tile, cols, grads = _weight_launch(x), columns(x), arriving(grad)
    tiles = cdiv(rows, tile.rows)
    across = cdiv(channels, tile.channels), cdiv(outputs, tile.outputs)
    splits = splits_for(x, tiles, across[0] * across[1], tile.programs)
    parts = x.new_empty(splits, outputs, channels, dtype=torch.float32)
    launch(
        _weight_kernel, (*across, splits), x,
        *grads, x, affine.scale, affine.shift, parts, rows, channels // cols.unit,
        cols.read // cols.read_unit, *grads.rows, x.stride(0) // cols.row_unit,
        UNIT=cols.unit, READ_UNIT=cols.read_unit, ROW_UNIT=cols.row_unit, OUT=outputs, BM=tile.rows,
        BC=tile.channels, BO=tile.outputs, PRECISION=precision(x),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return parts


@triton.jit
def _active(
    x_at, scale, shift, cols, C, read, row_mask, EVEN: tl.constexpr, LAST: tl.constexpr,
    BEYOND: tl.constexpr,
):  # fmt: skip
    """Columns of a tile, normalised, [channels, rows]; only the `LAST` may be incomplete."""
    at = x_at[None, :] + cols[:, None]
    if LAST:
        mask = (cols < read)[:, None] if EVEN else (cols < read)[:, None] & row_mask[None, :]
        values = tl.load(at, mask=mask, other=0.0)
        scales = tl.load(scale + cols, mask=cols < C, other=0.0)
        shifts = tl.load(shift + cols, mask=cols < C, other=0.0)
    else:
        values = tl.load(at) if EVEN else tl.load(at, mask=row_mask[None, :], other=0.0)
        scales, shifts = tl.load(scale + cols), tl.load(shift + cols)
    act = normalised(values, scales[:, None], shifts[:, None])
    if LAST and BEYOND:
        act = tl.where((cols < C)[:, None], act, 0.0)
    return act


@triton.jit(do_not_specialize=["rows", "c_units", "read_units", "x_units"])
def _forward_kernel(
    x, scale, shift, weight, bias, after_scale, after_shift, out, parts, rows, c_units, read_units,
    x_units, out_row, UNIT: tl.constexpr, READ_UNIT: tl.constexpr, ROW_UNIT: tl.constexpr,
    BEYOND: tl.constexpr, EVEN: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C, read, x_row = c_units * UNIT, read_units * READ_UNIT, x_units * ROW_UNIT
    ACROSS: tl.constexpr = (OUT + BO - 1) // BO
    tile = tl.program_id(0) // ACROSS
    places = tile * BM + tl.arange(0, BM)
    row_mask, places = places < rows, places.to(tl.int64)
    outputs = (tl.program_id(0) % ACROSS) * BO + tl.arange(0, BO)
    out_mask = outputs < OUT
    x_at, w_at = x + places * x_row, weight + outputs[:, None] * C
    # Upright, [outputs, rows]: see `masked_back`.
    acc = tl.zeros((BO, BM), tl.float32)
    whole = C // BC * BC
    for start in range(0, whole, BC):
        cols = start + tl.arange(0, BC)
        act = _active(x_at, scale, shift, cols, C, read, row_mask, EVEN, False, BEYOND)
        w = tl.load(w_at + cols[None, :], mask=out_mask[:, None], other=0.0)
        acc = tl.dot(w, act, acc, input_precision=PRECISION)
    if whole < C:
        cols = whole + tl.arange(0, BC)
        act = _active(x_at, scale, shift, cols, C, read, row_mask, EVEN, True, BEYOND)
        w = tl.load(w_at + cols[None, :], mask=out_mask[:, None] & (cols < C)[None, :], other=0.0)
        acc = tl.dot(w, act, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + outputs, mask=out_mask, other=0.0).to(tl.float32)[:, None]
    if after_scale is not None:
        scales = tl.load(after_scale + outputs, mask=out_mask, other=0.0)
        shifts = tl.load(after_shift + outputs, mask=out_mask, other=0.0)
        acc = normalised(acc, scales[:, None], shifts[:, None])
    result = acc.to(out.dtype.element_ty)
    mask = out_mask[:, None] if EVEN else out_mask[:, None] & row_mask[None, :]
    tl.store(out + places[None, :] * out_row + outputs[:, None], result, mask=mask)
    if parts is not None:
        values = result.to(tl.float32)
        if not EVEN:
            values = tl.where(row_mask[None, :], values, 0.0)
        mean = tl.sum(values, axis=1) / tl.minimum(rows - tile * BM, BM).to(tl.float32)
        apart = values - mean[:, None]
        if not EVEN:
            apart = tl.where(row_mask[None, :], apart, 0.0)
        at = parts + tile.to(tl.int64) * 2 * OUT + outputs
        tl.store(at, mean, mask=out_mask)
        tl.store(at + OUT, tl.sum(apart * apart, axis=1), mask=out_mask)


@triton.jit(
    do_not_specialize=["rows", "c_units", "read_units", "x_units", "total_units", "base_units"]
)
def _backward_kernel(
    g, gx, g_scale, g_mean, g_a, g_b, x, scale, shift, mean, weight, total, base, weight_parts,
    norm_parts, rows, c_units, read_units, g_row, gx_row, x_units, total_units, base_units,
    UNIT: tl.constexpr, READ_UNIT: tl.constexpr, ROW_UNIT: tl.constexpr, OUT: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    WHOLE: tl.constexpr = OUT <= BO
    C, read, x_row = c_units * UNIT, read_units * READ_UNIT, x_units * ROW_UNIT
    split = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    col_mask, outputs = cols < C, tl.arange(0, BO)
    scales = tl.load(scale + cols, mask=col_mask, other=0.0)
    shifts = tl.load(shift + cols, mask=col_mask, other=0.0)
    means = tl.load(mean + cols, mask=col_mask, other=0.0)
    if WHOLE:
        w = tl.load(weight + outputs[None, :] * C + cols[:, None],
                    mask=(outputs < OUT)[None, :] & col_mask[:, None], other=0.0)  # fmt: skip
    sum_g, sum_gx = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if weight_parts is not None:
        grad_w = tl.zeros((BC, BO), tl.float32)
    index = tl.arange(0, BM)
    # With its stages named here, a loop would also load ahead what no product waits for, and keep
    # it in registers, where it is moved as soon as it is there.
    for tile in range(split, tl.cdiv(rows, BM), tl.num_programs(1)):
        row_mask, first = (tile * BM + index < rows) | EVEN, wide(tile) * BM
        values = tl.load(upright(x, first, index, x_row, cols),
                         mask=row_mask[None, :] & (cols < read)[:, None], other=0.0)  # fmt: skip
        mask = row_mask[None, :] & col_mask[:, None]
        before = loaded_total(total, base, first, index, total_units * ROW_UNIT,
                              base_units * ROW_UNIT, cols, mask, ADD)  # fmt: skip
        if WHOLE:
            grad = formed(g, gx, g_scale, g_mean, g_a, g_b, first, index, row_mask, g_row, gx_row,
                          outputs, outputs < OUT)  # fmt: skip
            back = tl.dot(w, tl.trans(grad), input_precision=PRECISION)
        else:
            back = tl.zeros((BC, BM), tl.float32)
            for start in range(0, OUT, BO):
                some = start + outputs
                grad = formed(g, gx, g_scale, g_mean, g_a, g_b, first, index, row_mask, g_row,
                              gx_row, some, some < OUT)  # fmt: skip
                w = tl.load(weight + some[None, :] * C + cols[:, None],
                            mask=(some < OUT)[None, :] & col_mask[:, None], other=0.0)  # fmt: skip
                back = tl.dot(w, tl.trans(grad), back, input_precision=PRECISION)
        act, more_g, more_gx = masked_back(
            back, values, scales, shifts, means, before, total, first, index,
            total_units * ROW_UNIT, cols, mask, ADD,
        )  # fmt: skip
        sum_g += more_g
        sum_gx += more_gx
        if weight_parts is not None:
            # Without effect. But a product of what comes from one load alone gets a layout of its
            # own, and x would no more be loaded ahead.
            act = tl.where(first >= 0, act, 0.0)
            grad_w = tl.dot(act, grad, grad_w, input_precision=PRECISION)
    at = norm_parts + split.to(tl.int64) * 2 * C + cols
    tl.store(at, sum_g, mask=col_mask)
    tl.store(at + C, sum_gx, mask=col_mask)
    if weight_parts is not None:
        at_w = weight_parts + (split.to(tl.int64) * OUT + outputs[None, :]) * C + cols[:, None]
        tl.store(at_w, grad_w, mask=(outputs < OUT)[None, :] & col_mask[:, None])


@triton.jit(do_not_specialize=["rows", "c_units", "read_units", "x_units"])
def _weight_kernel(
    g, gx, g_scale, g_mean, g_a, g_b, x, scale, shift, parts, rows, c_units, read_units, g_row,
    gx_row, x_units, UNIT: tl.constexpr, READ_UNIT: tl.constexpr, ROW_UNIT: tl.constexpr,
    OUT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    C, read, x_row = c_units * UNIT, read_units * READ_UNIT, x_units * ROW_UNIT
    split = tl.program_id(2)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    outputs = tl.program_id(1) * BO + tl.arange(0, BO)
    scales = tl.load(scale + cols, mask=cols < C, other=0.0)
    shifts = tl.load(shift + cols, mask=cols < C, other=0.0)
    grad_w = tl.zeros((BC, BO), tl.float32)
    index = tl.arange(0, BM)
    for tile in range(split, tl.cdiv(rows, BM), tl.num_programs(2)):
        row_mask, first = tile * BM + index < rows, wide(tile) * BM
        values = tl.load(upright(x, first, index, x_row, cols),
                         mask=row_mask[None, :] & (cols < read)[:, None], other=0.0)  # fmt: skip
        grad = formed(g, gx, g_scale, g_mean, g_a, g_b, first, index, row_mask, g_row, gx_row,
                      outputs, outputs < OUT)  # fmt: skip
        act = normalised(values, scales[:, None], shifts[:, None])
        grad_w = tl.dot(act, grad, grad_w, input_precision=PRECISION)
    at = parts + (split.to(tl.int64) * OUT + outputs[None, :]) * C + cols[:, None]
    tl.store(at, grad_w, mask=(outputs < OUT)[None, :] & (cols < C)[:, None])
