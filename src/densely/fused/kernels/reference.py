"""The kernels of the fused steps in plain PyTorch: the readable twin of every faster set.

Matrices are as `operands` has them. Sums over rows are made in the accumulation dtype (float32, or
float64 for float64), whatever the dtype of the maps.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from densely.fused.kernels.operands import (
    Affine,
    Convolution,
    FirstConvolution,
    NormGradient,
    NormVectors,
    Pending,
    Pooling,
    Space,
    Unfinished,
)


class Kernels:
    """The steps between which the dense block's memory is arranged."""

    name = "reference"

    def total_dtype(self, x: Tensor) -> torch.dtype:
        """In which the gradients of all readers of x's channels are summed up."""
        return accumulation_dtype(x)

    def matrix(self, rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised matrix on the device of `like`, its rows as far apart as is wise."""
        return like.new_empty(rows, columns, dtype=dtype)

    def affine(
        self, norm: NormVectors, after: Unfinished | None = None, out: Tensor | None = None
    ) -> Affine:
        """X * scale + shift = weight * (x - mean) / sqrt(var + eps) + bias.

        `after` are the moments of the norm's last channels, if they were left in parts: they are
        finished first. Scale, shift and rstd are rows of `out` [3, C], if it is given.
        """
        dtype = torch.float64 if norm.mean.dtype == torch.float64 else torch.float32
        weight, bias, mean, var = (v.to(dtype).contiguous() for v in norm[:4])
        rstd = (var + norm.eps).rsqrt()
        scale = weight * rstd
        vectors = torch.stack((scale, bias - mean * scale, rstd))
        scale, shift, rstd = vectors if out is None else out.copy_(vectors)
        return Affine(scale, shift, mean, rstd, norm.training)

    def affines(self, norms: Sequence[NormVectors]) -> list[Affine]:
        """`affine` of each of many norms in eval mode, whose statistics are all known before."""
        return [self.affine(norm) for norm in norms]

    def finish(self, moments: Unfinished | None) -> None:
        """Write moments that were left in parts, if any; here none are."""

    def moments(self, x: Tensor, out: tuple[Tensor, Tensor]) -> Unfinished | None:
        """Mean and biased variance of each column, to two vectors of the accumulation dtype.

        They are written now, or when `finish` or `affine` gets what is returned.
        """
        var, mean = torch.var_mean(x.to(accumulation_dtype(x)), dim=0, correction=0)
        out[0].copy_(mean)
        out[1].copy_(var)
        return None

    def column_sums(self, x: Tensor) -> Tensor:
        """Sum of each column, of the accumulation dtype."""
        mean, var = two_vectors(x, x.shape[1])
        self.finish(self.moments(x, (mean, var)))
        return mean * x.shape[0]

    def place(
        self, x: Tensor, out: Tensor, moments: tuple[Tensor, Tensor] | None
    ) -> Unfinished | None:
        """Copy a matrix to another one; `moments`, if given, are those of its columns."""
        out.copy_(x)
        return None if moments is None else self.moments(out, moments)

    def norm_relu(self, x: Tensor, affine: Affine) -> Tensor:
        """relu(x * scale + shift): a new matrix of x's dtype."""
        return torch.addcmul(affine.shift, x, affine.scale).relu_().to(x.dtype)

    def convolve(
        self, x: Tensor, conv: Convolution, out: Tensor, moments: tuple[Tensor, Tensor] | None
    ) -> Unfinished | None:
        """The convolution of x [rows, C], to `out` [rows, O].

        `moments`, if given, are those of the columns of `out`.
        """
        return self.place(convolve(self.norm_relu(x, conv.affine), conv), out, moments)

    def convolve_twice(
        self, x: Tensor, first: Convolution, second: Convolution, out: Tensor
    ) -> None:
        """`convolve` and again, where nobody asks for what lies between: a bottleneck's inference.

        Then the second norm's vectors, which are known before, may go into the first convolution.
        """
        between = x.new_empty(x.shape[0], first.weight.shape[0])
        self.convolve(x, first, between, None)
        self.convolve(between, second, out, None)

    def putting_aside(self, x: Tensor) -> AbstractContextManager[None]:
        """Within it, weights' gradients may be given before they are made; at its end they are."""
        return nullcontext()

    def convolve_backward(
        self, grad: Tensor | Pending, x: Tensor, conv: Convolution, needs_weight: bool
    ) -> tuple[Tensor | None, NormGradient, Pending]:
        """Back through `convolve`, where nobody else reads x.

        Returns:
            Gradients of the weight, of the norm's parameters, and of x.
        """
        grad_weight, norm, g = self._masked(grad, x, conv, needs_weight)
        return grad_weight, norm, input_gradient(g, x, conv.affine, norm)

    def convolve_backward_add(
        self,
        grad: Tensor | Pending,
        x: Tensor,
        conv: Convolution,
        needs_weight: bool,
        total: Tensor,
        base: Tensor | None,
        mean_terms: tuple[Tensor, Tensor],
    ) -> tuple[Tensor | None, NormGradient]:
        """As `convolve_backward`, but adds to what reaches x from its other readers.

        Adds scale * g to `total` [rows, C]; with a `base` the total becomes base + scale * g: the
        first writer stores, so that nobody has to clear it. If the norm takes its statistics from
        the batch, adds its a and b (see `densely.fused.block`) to `mean_terms`, two vectors [C].
        """
        grad_weight, norm, g = self._masked(grad, x, conv, needs_weight)
        torch.addcmul(total if base is None else base, g, conv.affine.scale, out=total)
        add_mean_terms(conv.affine, norm, x.shape[0], mean_terms)
        return grad_weight, norm

    def _masked(
        self, grad: Tensor | Pending, x: Tensor, conv: Convolution, needs_weight: bool
    ) -> tuple[Tensor | None, NormGradient, Tensor]:
        """Back through a convolution up to its norm's output: the last is that gradient, masked."""
        act = self.norm_relu(x, conv.affine)
        g, grad_weight = convolve_backward(self.form(grad), act, conv, needs_weight)
        norm, g = self.norm_relu_backward(g, act, x, conv.affine)
        return grad_weight, norm, g

    def norm_relu_backward(
        self, g: Tensor, act: Tensor, x: Tensor, affine: Affine
    ) -> tuple[NormGradient, Tensor]:
        """Mask g [rows, C] where relu was zero, and sum up for the norm's parameters."""
        g = torch.where(act <= 0, 0.0, g).to(affine.scale.dtype)
        bias = g.sum(dim=0)
        weight = (g * (x - affine.mean)).sum(dim=0) * affine.rstd
        return NormGradient(weight, bias), g

    def pool(
        self, x: Tensor, affine: Affine, pooling: Pooling, space: Space
    ) -> tuple[Tensor, Tensor]:
        """Pool relu(x * scale + shift): [rows, C] to [pooled rows, C], and what backward wants.

        The second tensor is as `choice` makes it.
        """
        maps = _two_axes(space).maps(self.norm_relu(x, affine))
        pooled = pooling.pooled(space).matrix(_pool(maps, pooling))
        return pooled, self.choice(pooled, pooling)

    def choice(self, pooled: Tensor, pooling: Pooling) -> Tensor:
        """An uninitialised tensor for what `pool` lets `pool_backward` know; here it is empty."""
        return pooled.new_empty(0, dtype=torch.uint8)

    def pool_backward(
        self,
        grad: Tensor,
        choice: Tensor,
        x: Tensor,
        affine: Affine,
        pooling: Pooling,
        space: Space,
        again: Tensor | None = None,
    ) -> tuple[Tensor, NormGradient]:
        """Back through `pool`: gradients of x, [rows, C], and of the norm's parameters.

        `choice` is what `pool` has given for it. What it has made goes to `again` [pooled rows, C],
        if that is given, since x is read anyway.
        """
        if again is not None:
            again.copy_(self.pool(x, affine, pooling, space)[0])
        act = self.norm_relu(x, affine)
        axes = _two_axes(space)
        grads = _two_axes(pooling.pooled(space)).maps(grad)
        g = axes.matrix(_pool_backward(grads, axes.maps(act), pooling))
        norm, g = self.norm_relu_backward(g, act, x, affine)
        out = self.matrix(x.shape[0], x.shape[1], x, x.dtype)
        return self.form(input_gradient(g, x, affine, norm), out), norm

    def image_sums(self, images: Tensor, conv: FirstConvolution) -> Tensor:
        """An uninitialised tensor for what `image_moments` leaves to `image_backward`; here none.

        Of the accumulation dtype.
        """
        return images.new_empty(0, dtype=accumulation_dtype(images))

    def image_moments(
        self,
        images: Tensor,
        conv: FirstConvolution,
        out: tuple[Tensor, Tensor],
        sums: Tensor | None,
    ) -> None:
        """Mean and biased variance of what the convolution makes of images [rows, C].

        `sums` is for `image_backward`; None where that will not be.
        """
        self.finish(self.moments(_first_maps(images, conv), out))

    def image_pool(
        self, images: Tensor, conv: FirstConvolution, affine: Affine, pooling: Pooling
    ) -> tuple[Tensor, Tensor]:
        """`pool` of the convolution, [rows, C] to [pooled rows, O], with what `pool` gives."""
        return self.pool(_first_maps(images, conv), affine, pooling, conv.made)

    def image_backward(
        self,
        grad: Tensor,
        choice: Tensor,
        sums: Tensor | None,
        images: Tensor,
        conv: FirstConvolution,
        affine: Affine,
        pooling: Pooling,
    ) -> tuple[Tensor, NormGradient]:
        """Back through `image_pool`: gradients of the weight and of the norm's parameters.

        `sums` is what `image_moments` has left; None for a norm in eval mode.
        """
        maps = _first_maps(images, conv)
        grad_maps, norm = self.pool_backward(grad, choice, maps, affine, pooling, conv.made)
        _, weight, _ = torch.ops.aten.convolution_backward(
            conv.made.maps(grad_maps), conv.space.maps(images), conv.weight, None, conv.stride,
            [0, 0], [1, 1], False, [0, 0], 1, [False, True, False],
        )  # fmt: skip
        return weight, norm

    def form(self, grad: Tensor | Pending, out: Tensor | None = None) -> Tensor:
        """The gradient, in the dtype of the maps; to `out`, if given, which may be `grad.g`.

        A tensor is formed already, and comes back as it is.
        """
        if isinstance(grad, Tensor):
            return grad
        value = grad.g if grad.scale is None else grad.g * grad.scale
        if grad.mean is not None and grad.a is not None and grad.b is not None:
            value = value - grad.a - (grad.x - grad.mean) * grad.b
        formed = value.to(grad.x.dtype)
        return formed if out is None else out.copy_(formed)


def input_gradient(g: Tensor, x: Tensor, affine: Affine, norm: NormGradient) -> Pending:
    """What a batch norm with one reader hands back for its input; see `densely.fused.block`."""
    if not affine.training:
        return Pending(g, x, affine.scale, None, None, None)
    return Pending(g, x, affine.scale, affine.mean, *mean_terms(affine, norm, x.shape[0]))


def mean_terms(affine: Affine, norm: NormGradient, rows: int) -> tuple[Tensor, Tensor]:
    """Gradient by way of batch mean and variance: a + (x - mean) * b is to be taken off."""
    over_rows = affine.scale / rows
    return over_rows * norm.bias, over_rows * affine.rstd * norm.weight


def add_mean_terms(
    affine: Affine, norm: NormGradient, rows: int, sums: tuple[Tensor, Tensor]
) -> None:
    """Add the two terms to `sums`, if the norm is in train mode."""
    if affine.training:
        for total, more in zip(sums, mean_terms(affine, norm, rows), strict=True):
            total += more


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """In which sums over maps like x are made."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def convolve(act: Tensor, conv: Convolution) -> Tensor:
    """The convolution itself, [rows, C] to [rows, O], through PyTorch."""
    if conv.pointwise:
        flat = conv.weight.flatten(1).t()
        return torch.mm(act, flat) if conv.bias is None else torch.addmm(conv.bias, act, flat)
    maps, weight = two_dimensional(conv.space.maps(act), conv.weight)
    padding = same_padding(weight, conv.dilation)
    new = _CONV[maps.dim() - 2](maps, weight, conv.bias, 1, padding, conv.dilation)
    return conv.space.matrix(new)


def convolve_backward(
    grad: Tensor, act: Tensor, conv: Convolution, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `convolve`'s input and weight, in their dtypes."""
    weight, space = conv.weight, conv.space
    if conv.pointwise:
        flat = weight.flatten(1)
        grad_weight = torch.mm(grad.t(), act).view_as(weight) if needs_weight else None
        return torch.mm(grad, flat), grad_weight
    maps, kernel = two_dimensional(space.maps(act), weight)
    grads, _ = two_dimensional(space.maps(grad.contiguous()), weight)
    if maps.device.type == "cpu" and maps.dtype.itemsize == 2 and conv.dilation > 1:
        # There oneDNN's weight gradient of maps in channels-last is wrong, or crashes.
        maps, kernel, grads = maps.contiguous(), kernel.contiguous(), grads.contiguous()
    d = maps.dim() - 2
    grad_act, grad_weight, _ = torch.ops.aten.convolution_backward(
        grads, maps, kernel, None, [1] * d, same_padding(kernel, conv.dilation),
        [conv.dilation] * d, False, [0] * d, 1, [True, needs_weight, False],
    )  # fmt: skip
    return space.matrix(grad_act), grad_weight.view_as(weight) if needs_weight else None


def _first_maps(images: Tensor, conv: FirstConvolution) -> Tensor:
    """[rows, C] to [made rows, O]."""
    maps = conv.space.maps(images)
    return conv.made.matrix(F.conv2d(maps, conv.weight, None, conv.stride))


def two_vectors(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Room for a mean and a variance of `size` channels of maps like x."""
    dtype = accumulation_dtype(x)
    return x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=dtype)


def three_vectors(x: Tensor, size: int) -> Tensor:
    """Room for scale, shift and rstd of norms of so many channels of maps like x: [3, size]."""
    return x.new_empty(3, size, dtype=accumulation_dtype(x))


def two_dimensional(maps: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Signals as images one pixel high, which have a channels-last layout in PyTorch."""
    return (maps.unsqueeze(2), weight.unsqueeze(2)) if weight.dim() == 3 else (maps, weight)


def filled_taps(weight: Tensor) -> int:
    """Taps of a window, its lines filled up to a power of two, and all of it to another."""
    _, channels, height, width = weight.shape
    return _power_of_two(height * _power_of_two(width * channels))


def same_padding(weight: Tensor, dilation: int) -> list[int]:
    """Padding that keeps the size, an axis each."""
    return [dilation * (size // 2) for size in weight.shape[2:]]


def _power_of_two(number: int) -> int:
    """The smallest that is not below the number."""
    return 1 << (number - 1).bit_length()


def _two_axes(space: Space) -> Space:
    """Signals as images one pixel high, for PyTorch's poolings."""
    return Space(space.batch, (1, *space.size) if len(space.size) == 1 else space.size)


def _pool(maps: Tensor, pooling: Pooling) -> Tensor:
    step = (1,) * (maps.dim() - 2 - len(pooling.step)) + pooling.step
    if pooling.kind == "average":
        return _AVERAGE[maps.dim() - 2](maps, step)
    pooled, _ = _MAX[maps.dim() - 2](maps, *_max_windows(maps, step))
    return pooled  # type: ignore[no-any-return]


def _pool_backward(grad: Tensor, maps: Tensor, pooling: Pooling) -> Tensor:
    """Gradient of `_pool`'s input."""
    step = (1,) * (maps.dim() - 2 - len(pooling.step)) + pooling.step
    if pooling.kind == "max":
        windows = _max_windows(maps, step)
        _, index = _MAX[maps.dim() - 2](maps, *windows)
        return _MAX_BACKWARD[maps.dim() - 2](  # type: ignore[no-any-return]
            grad, maps, *windows, [1] * len(step), False, index
        )
    spread = grad / prod(step)
    result = torch.zeros_like(maps)
    for axis, count in enumerate(step, start=2):
        spread = spread.repeat_interleave(count, dim=axis)
    result[tuple(slice(size) for size in spread.shape)] = spread
    return result


def _max_windows(maps: Tensor, step: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Kernel, stride and padding: 3 places and 1 more at the edge, but along an axis of 1."""
    thin = [size == 1 and stride == 1 for size, stride in zip(maps.shape[2:], step, strict=True)]
    return [1 if t else 3 for t in thin], list(step), [0 if t else 1 for t in thin]


_CONV = {2: F.conv2d, 3: F.conv3d}
_AVERAGE = {2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX = {2: torch.ops.aten.max_pool2d_with_indices, 3: torch.ops.aten.max_pool3d_with_indices}
_MAX_BACKWARD = {
    2: torch.ops.aten.max_pool2d_with_indices_backward,
    3: torch.ops.aten.max_pool3d_with_indices_backward,
}
