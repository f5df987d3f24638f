"""From the images to the first block, fused: convolution, norm, ReLU, maximum pooling.

What the first convolution makes is the largest map of a network, and it reads the fewest channels.
So it is not kept: of the whole stem the images are, for each maximum its place, and what has the
size of the weights. Backward makes the convolution again where it needs it
(`densely.fused.kernels.triton_image_stem` has how).

The convolution's bias moves the mean and nothing else: a norm in train mode takes it off again,
and one in eval mode is given a mean without it. Its padding is laid around the images once, so that
no kernel has to ask where they end.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densely.fused import plain
from densely.fused.coefficients import (
    as_they_are,
    in_dtype,
    in_places,
    like,
    parameters,
    update_running_statistics,
)
from densely.fused.kernels import chosen
from densely.fused.kernels.operands import (
    Affine,
    FirstConvolution,
    NormVectors,
    Pooling,
    Space,
    window_places,
)
from densely.fused.kernels.reference import (
    Kernels,
    accumulation_dtype,
    three_vectors,
    two_vectors,
)
from densely.fused.operators import Operator
from densely.fused.precision import without_autocast
from densely.fused.second_order import gradients_with_gradients, plain_wanted


def image_stem(
    images: Tensor, conv: plain.FirstConv, norm: plain.Norm, stride: tuple[int, ...]
) -> Tensor:
    """`plain.image_stem`, fused: [N, C, H, W] to [N, O, H', W'].

    The images get no gradient, and may not ask for one.
    """
    outputs = conv.weight.shape[0]
    learnt = [*parameters(norm, images, outputs), conv.weight]
    learnt += [] if conv.bias is None else [conv.bias]
    statistics = as_they_are(plain.own_statistics(norm))
    needed = [tensor.requires_grad for tensor in learnt]
    setting = (norm.eps, list(conv.stride), list(stride))
    (height, width), (pad_h, pad_w) = made_size(images, conv), conv.padding
    images = F.pad(images, (pad_w, pad_w, pad_h, pad_h))
    images = images.contiguous(memory_format=torch.channels_last)  # once for both ways
    if torch.is_grad_enabled() and any(needed):
        output, mean, var, *_ = _ImageStem.apply(  # type: ignore[no-untyped-call]
            setting, statistics, needed, images, *learnt
        )
    else:
        output, mean, var, *_ = image_stem_forward(images, learnt, statistics, *setting, False)
    if plain.takes_batch(norm):
        moved = mean if conv.bias is None else mean + conv.bias.detach()
        update_running_statistics([(norm, moved, var)], len(images) * height * width)
    return output  # type: ignore[no-any-return]


def made_size(images: Tensor, conv: plain.FirstConv) -> tuple[int, ...]:
    """Of the maps that the convolution makes of images [N, C, H, W]; below 1 if it makes none."""
    axes = zip(images.shape[2:], conv.padding, strict=True)
    padded = [size + 2 * pad for size, pad in axes]
    return window_places(padded, conv.weight.shape[2:], conv.stride)


class _ImageStem(torch.autograd.Function):
    """The two operators below as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        setting: tuple[float, list[int], list[int]],
        statistics: list[Tensor],
        needed: list[bool],
        images: Tensor,
        *learnt: Tensor,
    ) -> tuple[Tensor, ...]:
        output, mean, var, *kept = image_stem_forward(images, learnt, statistics, *setting, True)
        kept = [mean, *kept]
        ctx.save_for_backward(images, *kept, *statistics, *learnt)
        ctx.setting, ctx.needed = setting, needed
        ctx.num_kept, ctx.num_statistics = len(kept), len(statistics)
        ctx.mark_non_differentiable(var, *kept)
        ctx.set_materialize_grads(False)
        return output, mean, var, *kept[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, *(None for _ in ctx.needed)
        images, *rest = ctx.saved_tensors
        kept, rest = rest[: ctx.num_kept], rest[ctx.num_kept :]
        statistics, learnt = rest[: ctx.num_statistics], rest[ctx.num_statistics :]
        with without_autocast(grad):
            if plain_wanted(grad):
                found = _differentiable_backward(
                    grad, images, learnt, statistics, ctx.setting, ctx.needed
                )
            else:
                _, stride, step = ctx.setting
                found = image_stem_backward(
                    grad, images, kept, learnt, statistics, stride, step, ctx.needed
                )
        return None, None, None, None, *in_places(found, ctx.needed)


@Operator
def image_stem_forward(
    images: Tensor,
    learnt: Sequence[Tensor],
    statistics: Sequence[Tensor],
    eps: float,
    stride: Sequence[int],
    step: Sequence[int],
    keep: bool,
) -> list[Tensor]:
    """Output; mean and var of the convolution without its bias; what backward wants.

    `learnt` are weight and bias of the norm, weight and, if it has one, bias of the convolution.
    With `statistics` for the norm the mean and var are empty. Backward wants the maxima's places;
    sums, which are empty with `statistics` or unless `keep`; the norm's affine [3, O]; and a copy
    of the weight, where it is of another dtype than the images.
    """
    (weight,), copies = in_dtype(learnt[2:3], images.dtype)
    conv, pooling, kernels = _parts(images, weight, stride, step)
    matrix = conv.space.matrix(images).contiguous()
    mean, var = two_vectors(images, 0 if statistics else conv.weight.shape[0])
    sums = _sums(kernels, matrix, conv, keep and not statistics)
    if not statistics:
        kernels.image_moments(matrix, conv, (mean, var), sums if sums.numel() else None)
    vectors = three_vectors(images, weight.shape[0])
    moments = _without_bias(learnt, statistics, mean), statistics[1] if statistics else var
    norm = NormVectors(learnt[0], learnt[1], *moments, eps, not statistics)
    pooled, choice = kernels.image_pool(matrix, conv, kernels.affine(norm, out=vectors), pooling)
    return [pooling.pooled(conv.made).made(pooled), mean, var, choice, sums, vectors, *copies]


@image_stem_forward.register_fake
def _(
    images: Tensor,
    learnt: Sequence[Tensor],
    statistics: Sequence[Tensor],
    eps: float,
    stride: Sequence[int],
    step: Sequence[int],
    keep: bool,
) -> list[Tensor]:
    (weight,), copies = in_dtype(learnt[2:3], images.dtype)
    conv, pooling, kernels = _parts(images, weight, stride, step)
    space, outputs = pooling.pooled(conv.made), weight.shape[0]
    pooled = images.new_empty(space.rows, outputs)
    moments = two_vectors(images, 0 if statistics else outputs)
    sums = _sums(kernels, images, conv, keep and not statistics)
    vectors = three_vectors(images, weight.shape[0])
    return [space.maps(pooled), *moments, kernels.choice(pooled, pooling), sums, vectors, *copies]


@Operator
def image_stem_backward(
    grad: Tensor,
    images: Tensor,
    kept: Sequence[Tensor],
    learnt: Sequence[Tensor],
    statistics: Sequence[Tensor],
    stride: Sequence[int],
    step: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of `learnt` that need one, in this order."""
    mean, choice, sums, vectors, *copies = kept
    (weight,), _ = in_dtype(learnt[2:3], images.dtype, copies)
    conv, pooling, kernels = _parts(images, weight, stride, step)
    affine = Affine.kept(vectors, _without_bias(learnt, statistics, mean), not statistics)
    upstream = pooling.pooled(conv.made).matrix(grad).contiguous()
    to_weight, norm = kernels.image_backward(
        upstream, choice, None if statistics else sums, conv.space.matrix(images).contiguous(),
        conv, affine, pooling,
    )  # fmt: skip
    found = [norm.weight, norm.bias, to_weight]
    if len(learnt) > 3:  # a norm in train mode hands back what sums to zero
        found.append(affine.scale * norm.bias if statistics else torch.zeros_like(norm.bias))
    return [like(g, t) for g, t, need in zip(found, learnt, needed, strict=True) if need]


@image_stem_backward.register_fake
def _(
    grad: Tensor,
    images: Tensor,
    kept: Sequence[Tensor],
    learnt: Sequence[Tensor],
    statistics: Sequence[Tensor],
    stride: Sequence[int],
    step: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(t) for t, need in zip(learnt, needed, strict=True) if need]


def _differentiable_backward(
    grad: Tensor,
    images: Tensor,
    learnt: Sequence[Tensor],
    statistics: Sequence[Tensor],
    setting: tuple[float, list[int], list[int]],
    needed: Sequence[bool],
) -> list[Tensor]:
    """The same gradients through plain PyTorch, so that they have gradients of their own."""
    eps, stride, step = setting
    mean, var = statistics or (None, None)

    def forward(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        norm = plain.Norm(norm_weight, norm_bias, mean, var, None, None, eps, not statistics)
        typed = [tensor.to(images.dtype) for tensor in (weight, *bias)]
        conv = plain.FirstConv(typed[0], typed[1] if bias else None, tuple(stride), (0, 0))
        return plain.image_stem(images, conv, norm, tuple(step))

    return gradients_with_gradients(forward, learnt, needed, grad)


def _parts(
    images: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    step: Sequence[int],
) -> tuple[FirstConvolution, Pooling, Kernels]:
    space = Space(images.shape[0], tuple(images.shape[2:]))
    conv = FirstConvolution(weight, tuple(stride), space)
    return conv, Pooling("max", tuple(step)), chosen(images)


def _sums(kernels: Kernels, images: Tensor, conv: FirstConvolution, wanted: bool) -> Tensor:
    if wanted:
        return kernels.image_sums(images, conv)
    return images.new_empty(0, dtype=accumulation_dtype(images))


def _without_bias(learnt: Sequence[Tensor], statistics: Sequence[Tensor], mean: Tensor) -> Tensor:
    """The norm's mean of what the convolution makes without its bias; `mean` is the batch's."""
    if not statistics:
        return mean
    if len(learnt) == 3:
        return statistics[0]
    return statistics[0].to(mean.dtype) - learnt[3].to(mean.dtype)
