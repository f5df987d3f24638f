"""Stem, transition and final norm, fused: of the maps the input alone is kept for backward.

All three are relu(norm(x)), pooled, and for a transition convolved 1x1. Kept besides are vectors,
weights in the dtype of the maps, and for maxima which they were. What is normalised is made again
in backward, and the gradient of x is that of a batch norm with one reader, dx = scale * g -
a - (x - mean) * b (`densely.fused.block` has the mathematics).

A transition and the final norm read a dense block's output, whose statistics the block has taken
already: they come along as `moments`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densely.fused import plain
from densely.fused.block_statistics import Moments
from densely.fused.coefficients import (
    as_they_are,
    in_dtype,
    in_places,
    like,
    parameters,
    update_running_statistics,
)
from densely.fused.kernels import chosen
from densely.fused.kernels.operands import Affine, NormVectors, Pooling, Space
from densely.fused.kernels.reference import three_vectors, two_vectors
from densely.fused.operators import Operator
from densely.fused.precision import without_autocast
from densely.fused.second_order import gradients_with_gradients, plain_wanted
from densely.fused.zero_sums import is_marked, mark


def transition(
    x: Tensor,
    norm: plain.Norm,
    conv: plain.Conv,
    window: tuple[int, ...],
    moments: Moments | None = None,
) -> Tensor:
    """`plain.transition`, fused: [N, C, *space] to [N, O, *space / window]."""
    return _read(x, norm, conv, Pooling("average", window), moments)


def stem(x: Tensor, norm: plain.Norm, stride: tuple[int, ...]) -> Tensor:
    """`plain.stem`, fused: [N, C, *space] to [N, C, *smaller]."""
    return _read(x, norm, None, Pooling("max", stride), None)


def final(x: Tensor, norm: plain.Norm, moments: Moments | None = None) -> Tensor:
    """`plain.final`, fused: [N, C, *space] to [N, C]."""
    return _read(x, norm, None, Pooling("average", tuple(x.shape[2:])), moments).flatten(1)


def _read(
    x: Tensor,
    norm: plain.Norm,
    conv: plain.Conv | None,
    pooling: Pooling,
    moments: Moments | None,
) -> Tensor:
    statistics: list[Tensor] = as_they_are(plain.own_statistics(norm))
    if plain.takes_batch(norm) and moments is not None:
        statistics = list(moments)
    learnt = parameters(norm, x, x.shape[1])
    convolution = [] if conv is None else [conv.weight]
    convolution += [] if conv is None or conv.bias is None else [conv.bias]
    tensors = [x, *learnt, *convolution]
    needed = [tensor.requires_grad for tensor in tensors]
    setting = (norm.eps, plain.takes_batch(norm), pooling.kind, list(pooling.step))
    if torch.is_grad_enabled() and any(needed):
        output, mean, var, *_ = _Reader.apply(  # type: ignore[no-untyped-call]
            setting, statistics, needed, *tensors
        )
    else:
        output, mean, var, *_ = reader_forward(x, learnt, statistics, convolution, *setting)
    if moments is not None:
        mean, var = moments
    update_running_statistics([(norm, mean, var)], x.numel() // x.shape[1])
    return output  # type: ignore[no-any-return]


class _Reader(torch.autograd.Function):
    """The two operators below as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        setting: tuple[float, bool, str, list[int]],
        statistics: list[Tensor],
        needed: list[bool],
        x: Tensor,
        *learnt: Tensor,
    ) -> tuple[Tensor, ...]:
        output, mean, var, *kept = reader_forward(x, learnt[:2], statistics, learnt[2:], *setting)
        ctx.save_for_backward(x, *(statistics or (mean, var)), *learnt, *kept)
        ctx.setting, ctx.needed = setting, needed
        ctx.mark_non_differentiable(mean, var, *kept)
        ctx.set_materialize_grads(False)
        return output, mean, var, *kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, *(None for _ in ctx.needed)
        x, mean, var, *rest = ctx.saved_tensors
        learnt, kept = rest[: len(ctx.needed) - 1], rest[len(ctx.needed) - 1 :]
        with without_autocast(grad):
            if plain_wanted(grad):
                found = _differentiable_backward(
                    grad, x, learnt, (mean, var), ctx.setting, ctx.needed
                )
            else:
                zero_sums = is_marked(grad)
                _, training, kind, step = ctx.setting
                found = reader_backward(
                    grad, x, mean, kept, learnt, training, kind, step, ctx.needed, zero_sums
                )
                if ctx.needed[0] and training:
                    mark(found[0])
        return None, None, None, *in_places(found, ctx.needed)


@Operator
def reader_forward(
    x: Tensor,
    norm: Sequence[Tensor],
    statistics: Sequence[Tensor],
    conv: Sequence[Tensor],
    eps: float,
    training: bool,
    kind: str,
    step: Sequence[int],
) -> list[Tensor]:
    """Output; mean and var of x, if they are not among the arguments; what backward wants.

    That is for maxima which they were, the norm's affine [3, C], and copies of the convolution's
    weight and bias, where these are of another dtype than x.
    """
    space, pooling, kernels = _space(x), Pooling(kind, tuple(step)), chosen(x)  # type: ignore[arg-type]
    matrix = space.matrix(x)
    taken = two_vectors(x, 0 if statistics else x.shape[1])
    left = None if statistics else kernels.moments(matrix, taken)
    weight, bias = norm
    mean, var = statistics or taken
    vectors = three_vectors(x, x.shape[1])
    affine = kernels.affine(NormVectors(weight, bias, mean, var, eps, training), left, vectors)
    pooled, choice = kernels.pool(matrix, affine, pooling, space)
    typed, copies = in_dtype(conv, x.dtype)
    if typed:
        pooled = F.linear(pooled, typed[0].flatten(1), *typed[1:])
    return [pooling.pooled(space).made(pooled), *taken, choice, vectors, *copies]


@reader_forward.register_fake
def _(
    x: Tensor,
    norm: Sequence[Tensor],
    statistics: Sequence[Tensor],
    conv: Sequence[Tensor],
    eps: float,
    training: bool,
    kind: str,
    step: Sequence[int],
) -> list[Tensor]:
    space = Pooling(kind, tuple(step)).pooled(_space(x))  # type: ignore[arg-type]
    output = space.maps(x.new_empty(space.rows, conv[0].shape[0] if conv else x.shape[1]))
    taken = two_vectors(x, 0 if statistics else x.shape[1])
    pooled = x.new_empty(space.rows, x.shape[1])
    choice = chosen(x).choice(pooled, Pooling(kind, tuple(step)))  # type: ignore[arg-type]
    vectors = three_vectors(x, x.shape[1])
    return [output, *taken, choice, vectors, *in_dtype(conv, x.dtype)[1]]


@Operator
def reader_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    kept: Sequence[Tensor],
    learnt: Sequence[Tensor],
    training: bool,
    kind: str,
    step: Sequence[int],
    needed: Sequence[bool],
    zero_sums: bool,
) -> list[Tensor]:
    """Gradients of those of (x, *learnt) that need one, in this order.

    With `zero_sums` each channel of `grad` is known to sum to zero.
    """
    space, pooling, kernels = _space(x), Pooling(kind, tuple(step)), chosen(x)  # type: ignore[arg-type]
    matrix, pooled = space.matrix(x), pooling.pooled(space)
    choice, vectors, *copies = kept
    affine = Affine.kept(vectors, mean, training)
    conv, _ = in_dtype(learnt[2:], x.dtype, copies)
    upstream = pooled.matrix(grad)
    to_pooled, read = upstream, None
    if conv:
        to_pooled = upstream @ conv[0].flatten(1)
        read = x.new_empty(pooled.rows, x.shape[1]) if needed[3] else None
    grad_x, norm = kernels.pool_backward(
        to_pooled.contiguous(), choice, matrix, affine, pooling, space, read
    )
    every: list[Tensor | None] = [norm.weight, norm.bias]
    if conv:
        every.append(None if read is None else (upstream.t() @ read).view_as(conv[0]))
    if len(conv) > 1:
        every.append(None)
        if needed[4]:
            every[-1] = torch.zeros_like(learnt[3]) if zero_sums else kernels.column_sums(upstream)
    return [space.made(grad_x)] * needed[0] + [
        like(g, t)
        for g, t, need in zip(every, learnt, needed[1:], strict=True)
        if need and g is not None
    ]


@reader_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    kept: Sequence[Tensor],
    learnt: Sequence[Tensor],
    training: bool,
    kind: str,
    step: Sequence[int],
    needed: Sequence[bool],
    zero_sums: bool,
) -> list[Tensor]:
    space = _space(x)
    grad_x = chosen(x).matrix(space.rows, x.shape[1], x, x.dtype)
    found = [space.maps(grad_x), *map(torch.empty_like, learnt)]
    return [tensor for tensor, need in zip(found, needed, strict=True) if need]


def _differentiable_backward(
    grad: Tensor,
    x: Tensor,
    learnt: Sequence[Tensor],
    statistics: tuple[Tensor, Tensor],
    setting: tuple[float, bool, str, list[int]],
    needed: Sequence[bool],
) -> list[Tensor]:
    """The same gradients through plain PyTorch, so that they have gradients of their own."""
    eps, training, kind, step = setting
    mean, var = (None, None) if training else statistics

    def forward(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *conv: Tensor) -> Tensor:
        norm = plain.Norm(norm_weight, norm_bias, mean, var, None, None, eps, training)
        if conv:
            weight, *bias = (tensor.to(x.dtype) for tensor in conv)
            convolution = plain.Conv(weight, bias[0] if bias else None)
            return plain.transition(x, norm, convolution, tuple(step))
        if kind == "max":
            return plain.stem(x, norm, tuple(step))
        return plain.final(x, norm).view(grad.shape)

    return gradients_with_gradients(forward, (x, *learnt), needed, grad)


def _space(x: Tensor) -> Space:
    return Space(x.shape[0], tuple(x.shape[2:]))
