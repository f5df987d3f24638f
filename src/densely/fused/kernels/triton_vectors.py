"""Triton kernels on a norm's vectors: its affine, and what is left of its sums over rows.

Kernels that pass over rows leave partial results, a part for each tile of rows, and add nothing up:
nothing is atomic, so sums have a fixed order. Here the parts are put together.

- Parts of moments, float32 [tiles, 2, C]: a tile's mean and M2, its sum of squared deviations from
  that mean. Tile t covers rows t * tile_rows up to (t + 1) * tile_rows, or to the last row.
- Parts of a norm's sums, float32 [parts, 2, C]: sum(g) and sum(g * (x - mean)).
- Parts of a weight's gradient, float32 [splits, *shape].

A program takes 8 columns, which is a sector of memory, and up to 1024 parts at once; thousands of
parts are first put together in groups by more programs than the columns alone would give work to.

Source of the combination of moments: Chan, Golub and LeVeque (1979), equation 2.1.
"""

# Kernels are written in Triton's language, which has no types that mypy could follow.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densely.fused.kernels.operands import (
    Affine,
    NormGradient,
    NormVectors,
    Unfinished,
    side_by_side,
)
from densely.fused.kernels.triton_aside import Aside
from densely.fused.kernels.triton_tiles import cdiv, launch, next_power_of_2

_COLUMNS = 8  # of a program: 32 bytes
_PARTS = 1024  # of a program's turn
_MANY = 2048  # parts, from which on two launches are faster than one
_BLOCK = 256  # columns of a program, where no parts are to be added up
_WEIGHTS = 128  # of a program
_GROUP = 64  # parts that the first of two launches puts together


def affine(
    norm: NormVectors, after: Unfinished | None = None, out: Tensor | None = None
) -> Sequence[Tensor]:
    """Scale, shift and rstd of a norm; vectors [C] of any floating dtypes to float32.

    `after` are moments that are finished by the same launch: those of the norm's last channels.
    The three are rows of `out`, if it is given.
    """
    columns, vectors = norm.mean.shape[0], [vector.contiguous() for vector in norm[:4]]
    found = _vectors(3, norm.mean) if out is None else out.unbind()
    partials, tile_rows, tiles, new = None, 0, 0, 0
    if after is not None:
        partials, tile_rows = _grouped(after.partials, after.tile_rows, after.rows)
        tiles, _, new = partials.shape
    taken = min(_PARTS, next_power_of_2(max(1, tiles)))
    old_blocks = cdiv(columns - new, _BLOCK)
    launch(
        _affine, (old_blocks + cdiv(new, _COLUMNS),), norm.mean,
        *vectors, *found, norm.eps, columns, partials, tiles, tile_rows,
        0 if after is None else after.rows, new, old_blocks,
        BLOCK=_BLOCK, PARTS=taken, COLUMNS=_COLUMNS,
        num_warps=2 if after is None else _warps(taken),
    )  # fmt: skip
    return found


def affines(norms: Sequence[NormVectors]) -> list[Affine]:
    """Those of norms in eval mode with one eps: as one long norm, of copies beside each other."""
    places, length = side_by_side(norm.mean.shape[0] for norm in norms)
    beside = norms[0].mean.new_empty(4, length, dtype=torch.float32)
    copies = [vector[place] for vector in beside for place in places]
    torch._foreach_copy_(copies, [norm[i] for i in range(4) for norm in norms])
    weight, bias, mean, var = beside
    long = NormVectors(weight, bias, mean, var, norms[0].eps, False)
    scale, shift, rstd = affine(long)
    return [Affine(scale[place], shift[place], mean[place], rstd[place], False) for place in places]


def finish_moments(
    partials: Tensor, tile_rows: int, rows: int, mean_out: Tensor, var_out: Tensor
) -> None:
    """Mean and biased variance of `rows` rows from the moments of their tiles."""
    partials, tile_rows = _grouped(partials, tile_rows, rows)
    tiles, _, columns = partials.shape
    taken = min(_PARTS, next_power_of_2(tiles))
    launch(
        _combine_moments, (cdiv(columns, _COLUMNS),), partials,
        partials, mean_out, var_out, tiles, tile_rows, rows, columns, 0,
        FINAL=True, GROUP=0, PARTS=taken, COLUMNS=_COLUMNS, num_warps=_warps(taken),
    )  # fmt: skip


def _grouped(partials: Tensor, tile_rows: int, rows: int) -> tuple[Tensor, int]:
    """The moments of fewer and larger tiles, where there are very many."""
    tiles, _, columns = partials.shape
    if tiles <= _MANY:
        return partials, tile_rows
    groups = cdiv(tiles, _GROUP)
    grouped = partials.new_empty(groups, 2, columns)
    launch(
        _combine_moments, (cdiv(columns, _COLUMNS) * groups,), partials,
        partials, grouped, grouped[0, 1], tiles, tile_rows, rows, columns, 2 * columns,
        FINAL=False, GROUP=_GROUP, PARTS=_GROUP, COLUMNS=_COLUMNS, num_warps=1,
    )  # fmt: skip
    return grouped, tile_rows * _GROUP


class Finished(NamedTuple):
    """What the parts of a step's backward add up to.

    `terms` are a and b, None in eval mode; `weight` is the convolution's gradient, None where no
    parts of it were given.
    """

    norm: NormGradient
    terms: tuple[Tensor, Tensor] | None
    weight: Tensor | None


def finish_norm(
    partials: Tensor,
    affine: Affine,
    rows: int,
    mean_terms: tuple[Tensor, Tensor] | None = None,
    weight_parts: Tensor | None = None,
    aside: Aside | None = None,
) -> Finished:
    """Gradients of a norm's parameters from its sums, and in train mode its a and b.

    a = scale / rows * sum(g), b = scale * rstd^2 / rows * sum(g * (x - mean)): see
    `densely.fused.block`. They are added to `mean_terms` where these are given, else new vectors;
    there are none for a norm in eval mode. `weight_parts` [parts, *shape], float32, are added up by
    the same launch, or by one like it where they are made, `aside`.
    """
    parts, _, columns = partials.shape
    blocks = cdiv(columns, _COLUMNS)
    if parts > _MANY:
        groups = cdiv(parts, _GROUP)
        grouped = partials.new_empty(groups, 2, columns)
        launch(
            _add_parts, (blocks * groups,), partials,
            partials, grouped, parts, columns,
            GROUP=_GROUP, COLUMNS=_COLUMNS, num_warps=1,
        )  # fmt: skip
        partials, parts = grouped, groups
    made = _vectors(2 if mean_terms or not affine.training else 4, partials)
    terms = (mean_terms or (made[2], made[3])) if affine.training else None
    taken = min(_PARTS // 2, next_power_of_2(parts))
    weight, weights = None, 0
    if weight_parts is not None:
        weight = weight_parts.new_empty(weight_parts.shape[1:])
        weights = cdiv(weight.numel(), _WEIGHTS)

    def run(first: int, last: int) -> None:
        launch(
            _finish_norm, (last - first,), partials,
            partials, affine.scale, affine.rstd, made[0], made[1], *(terms or (None, None)),
            weight_parts, weight, parts, rows, columns, blocks - first,
            0 if weight_parts is None else weight_parts.shape[0],
            0 if weight is None else weight.numel(),
            ADD=mean_terms is not None, PARTS=taken, COLUMNS=_COLUMNS, WEIGHTS=_WEIGHTS,
            num_warps=_warps(taken) if weight is None else 4,
        )  # fmt: skip

    # The same kernel in both cases: none is left to be compiled while a graph is recorded.
    if aside is None or weight is None:
        run(0, blocks + weights)
    else:
        run(0, blocks)
        aside.run(partial(run, blocks, blocks + weights))
    return Finished(NormGradient(made[0], made[1]), terms, weight)


def _vectors(number: int, like: Tensor) -> list[Tensor]:
    """New float32 vectors of as many columns; outputs of an operator may not share memory."""
    columns = like.shape[-1]
    return [like.new_empty(columns, dtype=torch.float32) for _ in range(number)]


def _warps(parts: int) -> int:
    """About 16 values a thread."""
    return max(1, parts * _COLUMNS // 512)


@triton.jit
def _store_affine(w, b, m, v, scale, shift, rstd, eps, c, valid):
    # Rounded as in PyTorch: an error of two units here moves every value, and relu opens elsewhere.
    spread = tl.sqrt_rn(v + eps)
    r = tl.div_rn(tl.full(spread.shape, 1.0, tl.float32), spread)
    s = w * r
    tl.store(scale + c, s, mask=valid)
    tl.store(shift + c, b - m * s, mask=valid)
    tl.store(rstd + c, r, mask=valid)


@triton.jit(
    do_not_specialize=["columns", "tiles", "tile_rows", "rows", "new_columns", "old_blocks"]
)
def _affine(
    weight,  # [C], as the next six
    bias,
    mean,
    var,
    scale,
    shift,
    rstd,
    eps,
    columns,
    partials,  # [tiles, 2, new_columns], moments of the last columns; or None
    tiles,
    tile_rows,
    rows,
    new_columns,
    old_blocks,  # programs for columns whose moments are known
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    old = columns - new_columns
    if program < old_blocks:
        c = program * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(weight + c, mask=c < old, other=0.0).to(tl.float32)
        b = tl.load(bias + c, mask=c < old, other=0.0).to(tl.float32)
        m = tl.load(mean + c, mask=c < old, other=0.0).to(tl.float32)
        v = tl.load(var + c, mask=c < old, other=1.0).to(tl.float32)
        _store_affine(w, b, m, v, scale, shift, rstd, eps, c, c < old)
    elif partials is not None:
        _finish_new(
            program - old_blocks, weight, bias, mean, var, scale, shift, rstd, eps, old, partials,
            tiles, tile_rows, rows, new_columns, PARTS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _finish_new(
    block, weight, bias, mean, var, scale, shift, rstd, eps, old, partials, tiles, tile_rows, rows,
    columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    new = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    c, valid = old + new, new < columns
    # Asked for before the sums, whose barriers no load is moved across.
    w = tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=valid, other=0.0).to(tl.float32)
    m, second, count = _combined(partials, new, columns, 0, tiles, tile_rows, rows, PARTS)
    v = tl.div_rn(second, count)
    tl.store(mean + c, m, mask=valid)
    tl.store(var + c, v, mask=valid)
    _store_affine(w, b, m, v, scale, shift, rstd, eps, c, valid)


@triton.jit
def _moments_of(partials, c, columns, tile, last, tile_rows, rows):
    """Mean and M2 [tiles, columns] of some tiles, and their rows [tiles, 1]; 0 from `last` on."""
    valid = (tile < last) & (c < columns)
    at = partials + tile.to(tl.int64) * (2 * columns) + c
    mean = tl.load(at, mask=valid, other=0.0)
    m2 = tl.load(at + columns, mask=valid, other=0.0)
    count = tl.minimum(rows - tile.to(tl.int64) * tile_rows, tile_rows)
    return mean, m2, tl.where(tile < last, count, 0).to(tl.float32)


@triton.jit
def _combined(partials, c, columns, first, last, tile_rows, rows, PARTS: tl.constexpr):
    """Mean, sum of squared deviations and number of rows of the tiles from first to last."""
    tile = first + tl.arange(0, PARTS)[:, None]
    mean, m2, count = _moments_of(partials, c, columns, tile, last, tile_rows, rows)
    for start in range(first + PARTS, last, PARTS):
        tile = start + tl.arange(0, PARTS)[:, None]
        new_mean, new_m2, more = _moments_of(partials, c, columns, tile, last, tile_rows, rows)
        share = tl.div_rn(more, tl.maximum(count + more, 1.0))
        delta = tl.where(tile < last, new_mean - mean, 0.0)
        mean += delta * share
        m2 += new_m2 + delta * delta * (count * share)
        count += more
    begin = tl.full((), first, tl.int64) * tile_rows
    total = (tl.minimum(tl.full((), last, tl.int64) * tile_rows, rows) - begin).to(tl.float32)
    whole = tl.div_rn(tl.sum(mean * count, axis=0)[None, :], total)
    delta = mean - whole
    return whole, tl.sum(m2 + delta * delta * count, axis=0)[None, :], total


@triton.jit(do_not_specialize=["tiles", "tile_rows", "rows", "out_stride"])
def _combine_moments(
    partials,  # [tiles, 2, C]
    mean_out,  # [groups, C], rows out_stride apart
    second_out,  # the same: the variance if FINAL, else M2
    tiles,
    tile_rows,
    rows,
    columns,
    out_stride,
    FINAL: tl.constexpr,
    GROUP: tl.constexpr,  # tiles of a program; 0 for all
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLUMNS)  # on one axis with the groups: the others end at 65,535
    group = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = group * GROUP
    last = tl.minimum(first + GROUP, tiles) if GROUP > 0 else tiles
    whole, second, total = _combined(partials, c, columns, first, last, tile_rows, rows, PARTS)
    if FINAL:
        second = tl.div_rn(second, total)
    at = group.to(tl.int64) * out_stride + c
    tl.store(mean_out + at, whole, mask=c < columns)
    tl.store(second_out + at, second, mask=c < columns)


@triton.jit(do_not_specialize=["parts"])
def _add_parts(
    partials,  # [parts, 2, C]
    out,  # [groups, 2, C]
    parts,
    columns,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLUMNS)  # on one axis with the groups: the others end at 65,535
    group = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    part = group * GROUP + tl.arange(0, GROUP)[:, None]
    valid = (part < parts) & (c < columns)
    at = partials + part.to(tl.int64) * (2 * columns) + c
    g = tl.sum(tl.load(at, mask=valid, other=0.0), axis=0)[None, :]
    gx = tl.sum(tl.load(at + columns, mask=valid, other=0.0), axis=0)[None, :]
    to = out + group.to(tl.int64) * (2 * columns) + c
    tl.store(to, g, mask=c < columns)
    tl.store(to + columns, gx, mask=c < columns)


@triton.jit(do_not_specialize=["parts", "rows", "blocks", "weight_splits"])
def _finish_norm(
    partials,  # [parts, 2, C]
    scale,  # [C], as the next six
    rstd,
    norm_weight,
    norm_bias,
    a,  # None in eval mode, as b
    b,
    weight_parts,  # [weight_splits, weights], or None, as the next
    weight,  # [weights]
    parts,
    rows,
    columns,
    blocks,  # programs for the norm; the others add up weights
    weight_splits,
    weights,
    ADD: tl.constexpr,  # to what is in a and b
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < blocks:
        _finish_columns(
            program, partials, scale, rstd, norm_weight, norm_bias, a, b, parts, rows, columns,
            ADD, PARTS, COLUMNS,
        )  # fmt: skip
    elif weight_parts is not None:
        _add_weights(program - blocks, weight_parts, weight, weight_splits, weights, WEIGHTS)


@triton.jit
def _finish_columns(
    block, partials, scale, rstd, norm_weight, norm_bias, a, b, parts, rows, columns,
    ADD: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < columns
    # Asked for before the sums, whose barriers no load is moved across.
    r = tl.load(rstd + c, mask=inside, other=0.0)
    if a is not None:
        s = tl.load(scale + c, mask=inside, other=0.0)
        if ADD:
            a_before = tl.load(a + c, mask=inside, other=0.0)
            b_before = tl.load(b + c, mask=inside, other=0.0)
    g = tl.zeros([PARTS, COLUMNS], tl.float32)
    gx = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        valid = (part < parts) & inside[None, :]
        at = partials + part.to(tl.int64) * (2 * columns) + c[None, :]
        g += tl.load(at, mask=valid, other=0.0)
        gx += tl.load(at + columns, mask=valid, other=0.0)
    to_bias = tl.sum(g, axis=0)
    to_weight = tl.sum(gx, axis=0) * r
    tl.store(norm_bias + c, to_bias, mask=inside)
    tl.store(norm_weight + c, to_weight, mask=inside)
    if a is not None:
        over_rows = s / rows
        to_a, to_b = over_rows * to_bias, over_rows * r * to_weight
        if ADD:
            to_a += a_before
            to_b += b_before
        tl.store(a + c, to_a, mask=inside)
        tl.store(b + c, to_b, mask=inside)


@triton.jit
def _add_weights(block, weight_parts, weight, splits, weights, WEIGHTS: tl.constexpr):
    w = block * WEIGHTS + tl.arange(0, WEIGHTS)[None, :]
    inside = w < weights
    total = tl.zeros([8, WEIGHTS], tl.float32)
    for start in range(0, splits, 8):
        split = start + tl.arange(0, 8)[:, None]
        at = weight_parts + split.to(tl.int64) * weights + w
        total += tl.load(at, mask=(split < splits) & inside, other=0.0)
    tl.store(weight + w, tl.sum(total, axis=0)[None, :], mask=inside)
