"""Triton kernels from the images to the first block: convolution, norm, ReLU, maximum pooling.

The first convolution reads few channels and makes many, so its output is the largest map of a
network, and making it again from the images is cheaper than reading it. It is never stored:

- its moments are taken from products that are thrown away;
- pooling makes it again, place by place of the windows, and keeps which place won (255: none was
  above zero), as `triton_pooling` does;
- backward needs its gradient dy only within the weight's, dW = sum over rows of dy * patch, where
  `patch` is what the convolution sees of the images. With dy as batch norm hands it back,

      dW = scale * (T - sum(g) / N * P - rstd * dgamma / N * Q)
      T = sum g * patch,   P = sum patch,   Q = sum (y - mean) * patch
      dgamma = rstd * (sum over patch of weight * T - mean * sum(g))

  P and Q come with the moments, T from one pass over the maxima: their g is all there is of it.

Patches stand upright, [taps, rows], so that neighbouring threads read neighbouring pixels. A line
of the window takes the next power of two of taps, and the images' width is a constant: then the
place of a tap is that of its row and a constant more, which a load takes for nothing. No sum is
atomic: programs leave parts, which are added in a fixed order.
"""

# Kernels are written in Triton's language, which has no types that mypy could follow.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densely.fused.kernels.operands import Affine, FirstConvolution, NormGradient, Pooling
from densely.fused.kernels.reference import filled_taps
from densely.fused.kernels.triton_tiles import cdiv, launch, next_power_of_2, precision, splits_for
from densely.fused.kernels.triton_vectors import finish_moments


class _Launch(NamedTuple):
    """Rows and outputs of a tile, warps of a program, and programs on a processor."""

    rows: int
    outputs: int
    warps: int
    programs: int


def _launch(conv: FirstConvolution, programs: int = 3) -> _Launch:
    """By a sweep on an H100, which took the same time for most others."""
    return _Launch(32, min(64, max(16, next_power_of_2(conv.weight.shape[0]))), 4, programs)


def moments(
    images: Tensor, conv: FirstConvolution, out: tuple[Tensor, Tensor], sums: Tensor | None
) -> None:
    """Mean and biased variance of each output of the convolution, to two vectors [O].

    Args:
        images: [rows, C], contiguous.
        conv: all taps of its window stand in registers at once: some 64, with filled lines.
        out: float32.
        sums: float32 [O + 1, kh * kw * C], becomes Q and, as its last row, P; None if nobody wants
            them.
    """
    tile, made = _launch(conv), conv.made
    outputs, taps = conv.weight.shape[0], conv.weight[0].numel()
    part_rows, parts, blocks = _divided(images, made.rows, outputs, tile)
    partials = _new(images, parts, 2, outputs)
    of_patches = None if sums is None else _new(images, parts, outputs + 1, taps)
    launch(
        _moments_kernel, (parts, blocks), images,
        images, _rows_of(conv), partials, of_patches, made.rows, part_rows, *_geometry(conv),
        *made.size, **_window(conv), **_options(images, tile),
    )  # fmt: skip
    finish_moments(partials, part_rows, made.rows, *out)
    if sums is not None:
        launch(
            _finish_sums, (outputs + 1,), images,
            of_patches, out[0], sums, parts, OUT=outputs, K=taps, **_adding(taps),
        )  # fmt: skip


def pool(
    images: Tensor,
    conv: FirstConvolution,
    affine: Affine,
    pooling: Pooling,
    out: Tensor,
    choice: Tensor,
) -> None:
    """Pool relu(y * scale + shift) of the convolution's y to `out` [pooled rows, O].

    `choice`, uint8 of the shape of `out`, becomes what `backward` needs.
    """
    tile = _launch(conv)
    rows, outputs = out.shape
    launch(
        _pool_kernel, (cdiv(rows, tile.rows), cdiv(outputs, tile.outputs)), images,
        images, _rows_of(conv), affine.scale, affine.shift, out, choice, rows, *_geometry(conv),
        *conv.made.size, *pooling.pooled(conv.made).size, *pooling.step,
        **_window(conv), **_options(images, tile),
    )  # fmt: skip


def backward(
    grad: Tensor,
    choice: Tensor,
    sums: Tensor | None,
    images: Tensor,
    conv: FirstConvolution,
    affine: Affine,
    pooling: Pooling,
) -> tuple[Tensor, NormGradient]:
    """Gradients of the convolution's weight and of the norm's parameters, float32.

    `grad` [pooled rows, O] is contiguous, `choice` is what `pool` has left, and `sums` what
    `moments` has; None for a norm in eval mode.
    """
    tile = _launch(conv, 4)
    rows, outputs = grad.shape
    taps = conv.weight[0].numel()
    part_rows, parts, blocks = _divided(images, rows, outputs, tile)
    of_patches, of_grad = _new(images, parts, outputs, taps), _new(images, parts, outputs)
    launch(
        _backward_kernel, (parts, blocks), images,
        grad, choice, images, of_patches, of_grad, rows, part_rows, *_geometry(conv),
        *conv.made.size, *pooling.pooled(conv.made).size, *pooling.step,
        **_window(conv), **_options(images, tile),
    )  # fmt: skip
    weight = _new(images, outputs, *conv.weight.shape[2:], conv.weight.shape[1])
    norm = NormGradient(_new(images, outputs), _new(images, outputs))
    launch(
        _finish_weight, (outputs,), images,
        of_patches, of_grad, sums, _rows_of(conv), affine.scale, affine.mean, affine.rstd, weight,
        norm.weight, norm.bias, parts, conv.made.rows, OUT=outputs, K=taps, **_adding(taps),
    )  # fmt: skip
    return weight.permute(0, 3, 1, 2), norm


def _divided(images: Tensor, rows: int, outputs: int, tile: _Launch) -> tuple[int, int, int]:
    """Rows of a part, whole tiles but for the last one's; number of parts, and of output blocks."""
    tiles, blocks = cdiv(rows, tile.rows), cdiv(outputs, tile.outputs)
    part_rows = cdiv(tiles, splits_for(images, tiles, blocks, tile.programs)) * tile.rows
    return part_rows, cdiv(rows, part_rows), blocks


def _adding(taps: int) -> dict[str, int]:
    """How parts of so many taps are added up: as many at once as registers hold."""
    width = int(next_power_of_2(taps))
    return {"KP": width, "PARTS": max(8, 4096 // width), "num_warps": 8}


def _new(images: Tensor, *shape: int) -> Tensor:
    return images.new_empty(shape, dtype=torch.float32)


def _rows_of(conv: FirstConvolution) -> Tensor:
    """The weights [O, kh, kw, C], contiguous: in the order of a patch."""
    return conv.weight.permute(0, 2, 3, 1).contiguous()


def _geometry(conv: FirstConvolution) -> tuple[int, ...]:
    """Height of the images, and the stride."""
    return (conv.space.size[0], *conv.stride)


def _window(conv: FirstConvolution) -> dict[str, int]:
    """`TAPS` of a line, `LINE` with those that fill it up, `K` of all lines, `KP` filled up."""
    outputs, channels, height, width = conv.weight.shape
    taps = width * channels
    return {
        "WIDTH": conv.space.size[1], "OUT": outputs, "C": channels, "TAPS": taps,
        "LINE": next_power_of_2(taps), "K": height * taps,
        "KP": max(16, filled_taps(conv.weight)),
    }  # fmt: skip


def _options(x: Tensor, tile: _Launch) -> dict[str, int | str]:
    return {
        "BM": tile.rows, "BO": tile.outputs, "PRECISION": precision(x), "num_warps": tile.warps,
    }  # fmt: skip


@triton.jit
def _place(row, height, width):
    """Image, line and place in the line of rows."""
    line = row // width
    return line // height, line % height, row % width


@triton.jit
def _tap(TAPS: tl.constexpr, LINE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Of each of KP: line in the window, tap in the line, number among K, and whether it is one."""
    k = tl.arange(0, KP).to(tl.int64)  # of 64 bits, so that the constant part of an address is seen
    down, along = k // LINE, k % LINE
    number = down * TAPS + along
    return down, along, number, (along < TAPS) & (number < K)


@triton.jit
def _patches(
    x, image, line, column, exists, height, WIDTH: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, LINE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """What windows see whose first place is (line, column) of an image: [KP, rows]."""
    down, along, _number, there = _tap(TAPS, LINE, K, KP)
    first = ((image.to(tl.int64) * height + line) * WIDTH + column) * C
    at = (x + first)[None, :] + (down * (WIDTH * C) + along)[:, None]
    at = tl.max_contiguous(at, [1, 1])  # or threads would stand along the taps
    return tl.load(at, mask=exists[None, :] & there[:, None], other=0.0)


@triton.jit
def _weights(
    weight, outputs, OUT: tl.constexpr, TAPS: tl.constexpr, LINE: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """[outputs, KP], zero beyond what there is."""
    _down, _along, number, there = _tap(TAPS, LINE, K, KP)
    mask = (outputs < OUT)[:, None] & there[None, :]
    return tl.load(weight + outputs[:, None] * K + number[None, :], mask=mask, other=0.0)


_GEOMETRY = ["height", "stride_h", "stride_w", "made_h", "made_w"]
_POOLED = [*_GEOMETRY, "pooled_h", "pooled_w", "step_h", "step_w"]


@triton.jit(do_not_specialize=["rows", "part_rows", *_GEOMETRY])
def _moments_kernel(
    x,  # [images * height * WIDTH, C]
    weight,  # [O, K]
    partials,  # [parts, 2, O]: mean and M2
    of_patches,  # [parts, O + 1, K]: sums of y * patch and of patch; or None
    rows, part_rows, height, stride_h, stride_w, made_h, made_w,
    WIDTH: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    LINE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    outputs = tl.program_id(1) * BO + tl.arange(0, BO)
    w = _weights(weight, outputs, OUT, TAPS, LINE, K, KP)
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)
    turn = 0.0
    mean, m2 = tl.zeros([BO, BM], tl.float32), tl.zeros([BO, BM], tl.float32)
    products, alone = tl.zeros([BO, KP], tl.float32), tl.zeros([KP, BM], tl.float32)
    for start in range(first, last, BM):  # Welford's update, for each thread's own rows
        row = start + tl.arange(0, BM)
        exists = row < last
        image, h, v = _place(row, made_h, made_w)
        patch = _patches(
            x, image, h * stride_h, v * stride_w, exists, height, WIDTH, C, TAPS, LINE, K, KP
        )
        y = tl.dot(w, patch, input_precision=PRECISION)
        turn += 1.0
        delta = tl.where(exists[None, :], y - mean, 0.0)
        mean += delta * (1.0 / turn)
        m2 += delta * (y - mean)
        if of_patches is not None:
            across = tl.trans(patch)
            products = tl.dot(y.to(patch.dtype), across, products, input_precision=PRECISION)
            alone += patch.to(tl.float32)
    total = last - first
    count = (total // BM + (tl.arange(0, BM) < total % BM)).to(tl.float32)
    whole = tl.sum(mean * count[None, :], axis=1) / total.to(tl.float32)
    delta = mean - whole[:, None]
    inside = outputs < OUT
    to = partials + part * (2 * OUT) + outputs
    tl.store(to, whole, mask=inside)
    tl.store(to + OUT, tl.sum(m2 + delta * delta * count[None, :], axis=1), mask=inside)
    if of_patches is not None:
        _down, _along, number, there = _tap(TAPS, LINE, K, KP)
        to = of_patches + part.to(tl.int64) * ((OUT + 1) * K)
        mask = inside[:, None] & there[None, :]
        tl.store(to + outputs[:, None] * K + number[None, :], products, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(to + OUT * K + number, tl.sum(alone, axis=1), mask=there)


@triton.jit(do_not_specialize=["parts"])
def _finish_sums(
    of_patches,  # [parts, O + 1, K]
    mean,  # [O]
    sums,  # [O + 1, K]
    parts,
    OUT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0)
    k = tl.arange(0, KP)
    # Asked for before the sums, whose barriers no load is moved across.
    center = tl.load(mean + output, mask=output < OUT, other=0.0)  # the last row is P itself
    own, alone = tl.zeros([PARTS, KP], tl.float32), tl.zeros([PARTS, KP], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (k < K)[None, :]
        at = of_patches + part.to(tl.int64)[:, None] * ((OUT + 1) * K) + k[None, :]
        own += tl.load(at + output * K, mask=there, other=0.0)
        alone += tl.load(at + OUT * K, mask=there, other=0.0)
    found = tl.sum(own, axis=0) - center * tl.sum(alone, axis=0)
    tl.store(sums + output * K + k, found, mask=k < K)


@triton.jit(do_not_specialize=["rows", *_POOLED])
def _pool_kernel(
    x,  # [images * height * WIDTH, C]
    weight,  # [O, K]
    scale,  # [O]
    shift,  # [O]
    out,  # [rows, O]
    choice,  # [rows, O]
    rows, height, stride_h, stride_w, made_h, made_w, pooled_h, pooled_w, step_h, step_w,
    WIDTH: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    LINE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < rows
    outputs = tl.program_id(1) * BO + tl.arange(0, BO)
    inside = outputs < OUT
    w = _weights(weight, outputs, OUT, TAPS, LINE, K, KP)
    s = tl.load(scale + outputs, mask=inside, other=0.0)[:, None]
    b = tl.load(shift + outputs, mask=inside, other=0.0)[:, None]
    image, h, v = _place(row, pooled_h, pooled_w)
    best = tl.full([BO, BM], float("-inf"), tl.float32)
    which = tl.zeros([BO, BM], tl.int32)
    for place in range(9):
        line, column = h * step_h + place // 3 - 1, v * step_w + place % 3 - 1
        there = exists & (line >= 0) & (line < made_h) & (column >= 0) & (column < made_w)
        patch = _patches(
            x, image, line * stride_h, column * stride_w, there, height, WIDTH, C, TAPS, LINE, K,
            KP,
        )  # fmt: skip
        y = tl.dot(w, patch, input_precision=PRECISION)
        value = tl.fma(y, tl.broadcast_to(s, y.shape), tl.broadcast_to(b, y.shape))
        more = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        more = tl.where(there[None, :], more, best)
        # As bits: NaN wins once and stays. Of equal ones the first stays.
        wins = more.to(tl.int32, bitcast=True) != best.to(tl.int32, bitcast=True)
        which = tl.where(wins, place, which)
        best = more
    which = tl.where(best <= 0, 255, which)  # NaN keeps its place
    best = tl.maximum(best, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mask = inside[:, None] & exists[None, :]
    at = row.to(tl.int64)[None, :] * OUT + outputs[:, None]
    tl.store(out + at, best.to(out.dtype.element_ty), mask=mask)
    tl.store(choice + at, which.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["rows", "part_rows", *_POOLED])
def _backward_kernel(
    grad,  # [rows, O]
    choice,  # [rows, O]
    x,  # [images * height * WIDTH, C]
    of_patches,  # [parts, O, K]: sums of g * patch
    of_grad,  # [parts, O]: sums of g
    rows, part_rows, height, stride_h, stride_w, made_h, made_w, pooled_h, pooled_w, step_h, step_w,
    WIDTH: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    LINE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    outputs = tl.program_id(1) * BO + tl.arange(0, BO)
    inside = outputs < OUT
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)
    products, total = tl.zeros([BO, KP], tl.float32), tl.zeros([BO, BM], tl.float32)
    for start in range(first, last, BM):
        row = start + tl.arange(0, BM)
        exists = row < last
        image, h, v = _place(row, pooled_h, pooled_w)
        at = row.to(tl.int64)[None, :] * OUT + outputs[:, None]
        mask = inside[:, None] & exists[None, :]
        which = tl.load(choice + at, mask=mask, other=255).to(tl.int32)
        g = tl.load(grad + at, mask=mask, other=0.0)
        total += tl.where(which < 255, g.to(tl.float32), 0.0)
        for place in range(9):
            line, column = h * step_h + place // 3 - 1, v * step_w + place % 3 - 1
            there = exists & (line >= 0) & (line < made_h) & (column >= 0) & (column < made_w)
            patch = _patches(
                x, image, line * stride_h, column * stride_w, there, height, WIDTH, C, TAPS, LINE,
                K, KP,
            )  # fmt: skip
            won = tl.where(which == place, g, 0.0).to(x.dtype.element_ty)
            products = tl.dot(won, tl.trans(patch), products, input_precision=PRECISION)
    _down, _along, number, there = _tap(TAPS, LINE, K, KP)
    to = of_patches + part.to(tl.int64) * (OUT * K) + outputs[:, None] * K + number[None, :]
    tl.store(to, products, mask=inside[:, None] & there[None, :])
    tl.store(of_grad + part * OUT + outputs, tl.sum(total, axis=1), mask=inside)


@triton.jit(do_not_specialize=["parts", "made_rows"])
def _finish_weight(
    of_patches,  # [parts, O, K]
    of_grad,  # [parts, O]
    sums,  # [O + 1, K]: Q and P; None in eval mode
    weight,  # [O, K]
    scale,  # [O], as the next two
    mean,
    rstd,
    to_weight,  # [O, K]
    to_norm_weight,  # [O]
    to_norm_bias,  # [O]
    parts, made_rows,
    OUT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0)
    k = tl.arange(0, KP)
    # Asked for before the sums, whose barriers no load is moved across.
    w = tl.load(weight + output * K + k, mask=k < K, other=0.0).to(tl.float32)
    s, m, r = tl.load(scale + output), tl.load(mean + output), tl.load(rstd + output)
    if sums is not None:
        p = tl.load(sums + OUT * K + k, mask=k < K, other=0.0)
        q = tl.load(sums + output * K + k, mask=k < K, other=0.0)
    own, g = tl.zeros([PARTS, KP], tl.float32), tl.zeros([PARTS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (k < K)[None, :]
        at = of_patches + part.to(tl.int64)[:, None] * (OUT * K) + output * K + k[None, :]
        own += tl.load(at, mask=there, other=0.0)
        g += tl.load(of_grad + part * OUT + output, mask=part < parts, other=0.0)
    own, sum_g = tl.sum(own, axis=0), tl.sum(g, axis=0)
    sum_gx = r * (tl.sum(w * own, axis=0) - m * sum_g)
    tl.store(to_norm_weight + output, sum_gx)
    tl.store(to_norm_bias + output, sum_g)
    if sums is not None:
        own -= (sum_g / made_rows) * p + (r * sum_gx / made_rows) * q
    tl.store(to_weight + output * K + k, own * s, mask=k < K)
