"""Kernels for GPUs, in Triton.

A step is few launches, each of which reads what it needs once: normalised maps, masked gradients
and a batch norm's share of a gradient are made in registers, on the way into a product or out of
it. What a pass over rows leaves in parts is put together by one small launch (`triton_vectors`).

float64 is left to the reference, and so are poolings along three axes. A convolution along three
axes runs through cuDNN between kernels that norm and mask.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from densely.fused.kernels import (
    triton_aside,
    triton_elementwise,
    triton_image_stem,
    triton_pointwise,
    triton_pooling,
    triton_pooling_backward,
    triton_spatial,
    triton_vectors,
)
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
from densely.fused.kernels.reference import Kernels, convolve, convolve_backward
from densely.fused.kernels.triton_vectors import Finished


class TritonKernels(Kernels):
    """All steps that Triton kernels run."""

    name = "triton"

    def total_dtype(self, x: Tensor) -> torch.dtype:
        """That of the maps: each reader adds once, as plain PyTorch rounds at each addition.

        What norms take off the sum in the end is rounded with it, though: see docs/log.md for
        where that shows.
        """
        return x.dtype

    def matrix(self, rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """As the reference: multiples of 8 values apart, so that loads take 16 bytes."""
        return like.new_empty(rows, columns + -columns % 8, dtype=dtype)[:, :columns]

    def affine(
        self, norm: NormVectors, after: Unfinished | None = None, out: Tensor | None = None
    ) -> Affine:
        """As the reference."""
        if norm.mean.dtype == torch.float64:
            return super().affine(norm, after, out)
        if not norm.training:
            self.finish(after)
            after = None
        scale, shift, rstd = triton_vectors.affine(norm, after, out)
        return Affine(scale, shift, norm.mean.float().contiguous(), rstd, norm.training)

    def affines(self, norms: Sequence[NormVectors]) -> list[Affine]:
        """As the reference; by a few launches for all where they have one eps."""
        if len({norm.eps for norm in norms}) != 1 or norms[0].mean.dtype == torch.float64:
            return super().affines(norms)
        return triton_vectors.affines(norms)

    def finish(self, moments: Unfinished | None) -> None:
        """As the reference."""
        if moments is not None:
            triton_vectors.finish_moments(*moments)

    def moments(self, x: Tensor, out: tuple[Tensor, Tensor]) -> Unfinished | None:
        """As the reference."""
        if x.dtype == torch.float64:
            return super().moments(x, out)
        return Unfinished(*triton_elementwise.moments(x), x.shape[0], *out)

    def place(
        self, x: Tensor, out: Tensor, moments: tuple[Tensor, Tensor] | None
    ) -> Unfinished | None:
        """As the reference."""
        if x.dtype == torch.float64 or moments is None:
            return super().place(x, out, moments)
        return Unfinished(*triton_elementwise.moments(x, out), x.shape[0], *moments)

    def norm_relu(self, x: Tensor, affine: Affine) -> Tensor:
        """As the reference."""
        if x.dtype == torch.float64:
            return super().norm_relu(x, affine)
        return triton_elementwise.norm_relu(x, affine)

    def convolve(
        self, x: Tensor, conv: Convolution, out: Tensor, moments: tuple[Tensor, Tensor] | None
    ) -> Unfinished | None:
        """As the reference."""
        if not _has_product(x, conv):
            return super().convolve(x, conv, out, moments)
        if conv.pointwise:
            weight = conv.weight.flatten(1)
            taken = triton_pointwise.forward(
                x, conv.affine, weight, conv.bias, out, moments is not None
            )
        else:
            taken = _over_window(x, conv.affine, conv, out, moments is not None)
        if moments is None or taken is None:
            return None
        return Unfinished(*taken, x.shape[0], *moments)

    def convolve_twice(
        self, x: Tensor, first: Convolution, second: Convolution, out: Tensor
    ) -> None:
        """As the reference; a 1x1 convolution puts what it makes through the second norm and relu.

        The second convolution reads that as it is, with no more than its products to do.
        """
        if not (_has_product(x, first) and first.pointwise):
            super().convolve_twice(x, first, second, out)
            return
        weight = first.weight.flatten(1)
        between = x.new_empty(x.shape[0], weight.shape[0])
        triton_pointwise.forward(x, first.affine, weight, first.bias, between, False, second.affine)
        if second.pointwise or not _has_product(x, second):
            self.place(convolve(between, second), out, None)
        else:
            _over_window(between, None, second, out, False)

    def putting_aside(self, x: Tensor) -> AbstractContextManager[None]:
        """As the reference."""
        return triton_aside.aside(x)

    def convolve_backward(
        self, grad: Tensor | Pending, x: Tensor, conv: Convolution, needs_weight: bool
    ) -> tuple[Tensor | None, NormGradient, Pending]:
        """As the reference."""
        if x.dtype == torch.float64:
            return super().convolve_backward(grad, x, conv, needs_weight)
        g, affine = x.new_empty(x.shape), conv.affine
        done = self._back(grad, x, conv, needs_weight, (g, None, False), None)
        mean, a, b = (affine.mean, *done.terms) if done.terms is not None else (None, None, None)
        return done.weight, done.norm, Pending(g, x, affine.scale, mean, a, b)

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
        """As the reference."""
        if x.dtype == torch.float64:
            return super().convolve_backward_add(
                grad, x, conv, needs_weight, total, base, mean_terms
            )
        done = self._back(grad, x, conv, needs_weight, (total, base, True), mean_terms)
        return done.weight, done.norm

    def _back(
        self,
        grad: Tensor | Pending,
        x: Tensor,
        conv: Convolution,
        needs_weight: bool,
        to: tuple[Tensor, Tensor | None, bool],
        mean_terms: tuple[Tensor, Tensor] | None,
    ) -> Finished:
        """What reaches x `to` total, base and whether to add them; all that comes of the sums."""
        affine, rows = conv.affine, x.shape[0]
        if not _has_product(x, conv):
            act = self.norm_relu(x, affine)
            g, grad_weight = convolve_backward(self.form(grad), act, conv, needs_weight)
            partials = triton_elementwise.norm_relu_backward(g, x, affine, *to)
            done = triton_vectors.finish_norm(partials, affine, rows, mean_terms)
            return done._replace(weight=grad_weight)
        if conv.pointwise:
            flat = conv.weight.flatten(1)
            if isinstance(grad, Pending) and triton_pointwise.wants_formed(x, flat.shape[0]):
                # With a scale it comes from `convolve_backward`, for this reader alone.
                grad = self.form(grad, None if grad.scale is None else grad.g)
            parts, partials = triton_pointwise.backward(grad, x, affine, flat, needs_weight, *to)
            done = triton_vectors.finish_norm(partials, affine, rows, mean_terms, parts)
            found = done.weight
        else:
            weight, space = _planar(conv)
            aside = triton_aside.current()
            if aside is not None:
                aside.wait()  # one convolution at a time, whose gradients take memory meanwhile
            formed = self.form(grad).contiguous()
            parts, partials = triton_spatial.backward(
                formed, x, affine, weight, conv.dilation, space, needs_weight, *to, aside
            )
            done = triton_vectors.finish_norm(partials, affine, rows, mean_terms, parts, aside)
            found = None if done.weight is None else done.weight.permute(0, 3, 1, 2)
        return done._replace(weight=None if found is None else found.view(conv.weight.shape))

    def pool(
        self, x: Tensor, affine: Affine, pooling: Pooling, space: Space
    ) -> tuple[Tensor, Tensor]:
        """As the reference."""
        if x.dtype == torch.float64 or not _has_places(space):
            return super().pool(x, affine, pooling, space)
        out = x.new_empty(pooling.pooled(space).rows, x.shape[1])
        choice = self.choice(out, pooling)
        triton_pooling.pool(x, affine, pooling, space, out, choice if choice.numel() else None)
        return out, choice

    def choice(self, pooled: Tensor, pooling: Pooling) -> Tensor:
        """For maxima, which place of its window each one was: see `triton_pooling`."""
        wanted = pooling.kind == "max" and len(pooling.step) <= 2 and pooled.dtype != torch.float64
        return pooled.new_empty(pooled.shape if wanted else 0, dtype=torch.uint8)

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
        """As the reference."""
        if x.dtype == torch.float64 or not _has_places(space):
            return super().pool_backward(grad, choice, x, affine, pooling, space, again)
        out = self.matrix(x.shape[0], x.shape[1], x, x.dtype)
        norm = triton_pooling_backward.pool_backward(
            grad, choice, x, affine, pooling, space, out, again
        )
        return out, norm

    def image_sums(self, images: Tensor, conv: FirstConvolution) -> Tensor:
        """As the reference: see `triton_image_stem`."""
        if images.dtype == torch.float64:
            return super().image_sums(images, conv)
        outputs, taps = conv.weight.shape[0], conv.weight[0].numel()
        return images.new_empty(outputs + 1, taps, dtype=torch.float32)

    def image_moments(
        self,
        images: Tensor,
        conv: FirstConvolution,
        out: tuple[Tensor, Tensor],
        sums: Tensor | None,
    ) -> None:
        """As the reference."""
        if images.dtype == torch.float64:
            super().image_moments(images, conv, out, sums)
        else:
            triton_image_stem.moments(images, conv, out, sums)

    def image_pool(
        self, images: Tensor, conv: FirstConvolution, affine: Affine, pooling: Pooling
    ) -> tuple[Tensor, Tensor]:
        """As the reference."""
        if images.dtype == torch.float64:
            return super().image_pool(images, conv, affine, pooling)
        rows = pooling.pooled(conv.made).rows
        out = images.new_empty(rows, conv.weight.shape[0])
        choice = self.choice(out, pooling)
        triton_image_stem.pool(images, conv, affine, pooling, out, choice)
        return out, choice

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
        """As the reference."""
        given = (grad, choice, sums, images, conv, affine, pooling)
        if images.dtype == torch.float64:
            return super().image_backward(*given)
        return triton_image_stem.backward(*given)

    def form(self, grad: Tensor | Pending, out: Tensor | None = None) -> Tensor:
        """As the reference."""
        if isinstance(grad, Tensor) or grad.x.dtype == torch.float64:
            return super().form(grad, out)
        out = grad.x.new_empty(grad.x.shape) if out is None else out
        triton_elementwise.form(grad, out)
        return out


#: Places along an axis of maps: `triton_tiles.place_of` is right for so many and a tile more.
_LONGEST = 900_000


def _has_product(x: Tensor, conv: Convolution) -> bool:
    """Whether there is a kernel for this convolution."""
    if x.dtype == torch.float64:
        return False
    return conv.pointwise or (conv.weight.dim() <= 4 and _has_places(conv.space))


def _has_places(space: Space) -> bool:
    """Whether kernels can tell where in the maps a row is."""
    return len(space.size) <= 2 and max(space.size) <= _LONGEST


def _over_window(
    x: Tensor, affine: Affine | None, conv: Convolution, out: Tensor, want_moments: bool
) -> tuple[Tensor, int] | None:
    """`triton_spatial.forward`."""
    weight, space = _planar(conv)
    return triton_spatial.forward(
        x, affine, weight, conv.bias, conv.dilation, space, out, want_moments
    )


def _planar(conv: Convolution) -> tuple[Tensor, Space]:
    """Along two axes: a signal is an image one pixel high."""
    if conv.weight.dim() == 3:
        return conv.weight.unsqueeze(2), Space(conv.space.batch, (1, *conv.space.size))
    return conv.weight, conv.space
