"""Kernels for CPUs, in C++: element-wise passes in tight loops, convolutions' backward in tiles.

What is overridden here and why (measurements: docs/log.md): relu(x * scale + shift) over a view of
some columns is several times faster in a plain loop than through PyTorch; a tile of rows that goes
through norm, product and backward while it is in the cache does not wait for memory; and a 3x3
convolution's weight gradient as a product with gathered rows is about twice as fast as oneDNN's.
Forward, oneDNN is ahead where the new channels fill its vectors, and behind where they do not and
it cannot mask them.
float64 is left to the reference. In bfloat16 tiles are for 1x1 convolutions, and in float16 there
are none: the products are oneDNN's, whole.
"""

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from densely.fused.kernels.operands import (
    Affine,
    Convolution,
    NormGradient,
    NormVectors,
    Pending,
    Pooling,
    Space,
    Unfinished,
)
from densely.fused.kernels.reference import (
    Kernels,
    accumulation_dtype,
    add_mean_terms,
    convolve,
    convolve_backward,
    input_gradient,
)


class CpuKernels(Kernels):
    """The compiled library at `path`, loaded once."""

    name = "cpu"

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        self._ops = torch.ops.densely_cpu

    def total_dtype(self, x: Tensor) -> torch.dtype:
        """That of the maps: adding is waiting for memory, and plain PyTorch rounds sums too."""
        return x.dtype

    def affine(
        self, norm: NormVectors, after: Unfinished | None = None, out: Tensor | None = None
    ) -> Affine:
        """As the reference."""
        vectors = norm[:4]
        if any(v.dtype != torch.float32 or v.stride(0) != 1 for v in vectors):
            return super().affine(norm, after, out)
        out = norm.mean.new_empty(3, norm.mean.shape[0]) if out is None else out
        scale, shift, rstd = out
        self._ops.affine(*vectors, norm.eps, out)
        return Affine(scale, shift, norm.mean, rstd, norm.training)

    def moments(self, x: Tensor, out: tuple[Tensor, Tensor]) -> Unfinished | None:
        """As the reference."""
        if x.dtype == torch.float64:
            return super().moments(x, out)
        self._ops.moments(x, *out)
        return None

    def place(
        self, x: Tensor, out: Tensor, moments: tuple[Tensor, Tensor] | None
    ) -> Unfinished | None:
        """As the reference."""
        if x.dtype == torch.float64 or moments is None:
            return super().place(x, out, moments)
        self._ops.place(x, out, *moments)
        return None

    def norm_relu(self, x: Tensor, affine: Affine) -> Tensor:
        """As the reference."""
        if x.dtype == torch.float64:
            return super().norm_relu(x, affine)
        out = x.new_empty(x.shape)
        self._ops.norm_relu(x, affine.scale, affine.shift, out)
        return out

    def convolve(
        self, x: Tensor, conv: Convolution, out: Tensor, moments: tuple[Tensor, Tensor] | None
    ) -> Unfinished | None:
        """As the reference."""
        if not _in_tiles(x, conv) or (not conv.pointwise and _fills_vectors(conv)):
            return super().convolve(x, conv, out, moments)
        mean, var = moments or (None, None)
        affine, bias = conv.affine, None if conv.bias is None else conv.bias.contiguous()
        if conv.pointwise:
            flat = conv.weight.flatten(1).contiguous()
            self._ops.pointwise(x, affine.scale, affine.shift, flat, bias, False, out, mean, var)
        else:
            self._ops.spatial(
                x, affine.scale, affine.shift, _by_tap(conv.weight), bias, _geometry(conv), out,
                mean, var,
            )  # fmt: skip
        return None

    def convolve_twice(
        self, x: Tensor, first: Convolution, second: Convolution, out: Tensor
    ) -> None:
        """As the reference; the second norm goes into a 1x1 convolution's weight and bias."""
        if x.dtype != torch.float32 or not first.pointwise:
            super().convolve_twice(x, first, second, out)
            return
        scale, shift = second.affine.scale, second.affine.shift
        weight = (first.weight.flatten(1) * scale[:, None]).contiguous()
        bias = shift if first.bias is None else shift + first.bias * scale
        between = x.new_empty(x.shape[0], weight.shape[0])
        self._ops.pointwise(
            x, first.affine.scale, first.affine.shift, weight, bias, True, between, None, None
        )
        if second.pointwise or _fills_vectors(second):
            self.place(convolve(between, second), out, None)
        else:  # its kernel norms what it reads: what is not below zero stays as it is
            ones, zeros = torch.ones_like(scale), torch.zeros_like(scale)
            as_it_is = Affine(ones, zeros, zeros, ones, False)
            self.convolve(between, second._replace(affine=as_it_is), out, None)

    def convolve_backward(
        self, grad: Tensor | Pending, x: Tensor, conv: Convolution, needs_weight: bool
    ) -> tuple[Tensor | None, NormGradient, Pending]:
        """As the reference."""
        if x.dtype == torch.float64:
            return super().convolve_backward(grad, x, conv, needs_weight)
        g = x.new_empty(x.shape)
        grad_weight, norm = self._back(grad, x, conv, needs_weight, g, None, False)
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
        """As the reference."""
        if x.dtype == torch.float64:
            return super().convolve_backward_add(
                grad, x, conv, needs_weight, total, base, mean_terms
            )
        grad_weight, norm = self._back(grad, x, conv, needs_weight, total, base, True)
        add_mean_terms(conv.affine, norm, x.shape[0], mean_terms)
        return grad_weight, norm

    def _back(
        self,
        grad: Tensor | Pending,
        x: Tensor,
        conv: Convolution,
        needs_weight: bool,
        out: Tensor,
        base: Tensor | None,
        accumulate: bool,
    ) -> tuple[Tensor | None, NormGradient]:
        norm = NormGradient(*_vectors(2, x))
        affine, weight = conv.affine, conv.weight
        if _in_tiles(x, conv, backward=True):
            if not conv.pointwise or isinstance(grad, Tensor):
                grad = Pending(self.form(grad), x, None, None, None, None)
            by_tap = _by_tap(weight)
            grad_by_tap = torch.empty_like(by_tap, dtype=torch.float32) if needs_weight else None
            self._ops.convolve_backward(
                grad.g, grad.x, grad.scale, grad.mean, grad.a, grad.b, x, affine.scale,
                affine.shift, affine.mean, affine.rstd, by_tap, _geometry(conv), base, out,
                accumulate, grad_by_tap, *norm,
            )  # fmt: skip
            if grad_by_tap is None:
                return None, norm
            taps = grad_by_tap.view(prod(weight.shape[2:]), *weight.shape[:2])
            return taps.permute(1, 2, 0).reshape(weight.shape), norm
        act = self.norm_relu(x, affine)
        g, grad_weight = convolve_backward(self.form(grad), act, conv, needs_weight)
        self._ops.norm_relu_backward(
            g.contiguous(), act, x, affine.scale, affine.mean, affine.rstd, base, out, accumulate,
            *norm,
        )  # fmt: skip
        return grad_weight, norm

    def pool(
        self, x: Tensor, affine: Affine, pooling: Pooling, space: Space
    ) -> tuple[Tensor, Tensor]:
        """As the reference."""
        if x.dtype == torch.float64:
            return super().pool(x, affine, pooling, space)
        out = x.new_empty(pooling.pooled(space).rows, x.shape[1])
        choice = self.choice(out, pooling)
        self._ops.pool(
            x, affine.scale, affine.shift, _windows(pooling, space), pooling.kind == "max", out,
            choice,
        )  # fmt: skip
        return out, choice

    def choice(self, pooled: Tensor, pooling: Pooling) -> Tensor:
        """For maxima, which place of its window each one was."""
        wanted = pooling.kind == "max" and pooled.dtype != torch.float64
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
        if x.dtype == torch.float64:
            return super().pool_backward(grad, choice, x, affine, pooling, space, again)
        if again is not None:
            again.copy_(self.pool(x, affine, pooling, space)[0])
        out = x.new_empty(x.shape)
        norm = NormGradient(*_vectors(2, x))
        self._ops.pool_backward(
            grad, choice, x, affine.scale, affine.shift, affine.mean, affine.rstd,
            affine.training, _windows(pooling, space), pooling.kind == "max", out, *norm,
        )  # fmt: skip
        return out, norm

    def form(self, grad: Tensor | Pending, out: Tensor | None = None) -> Tensor:
        """As the reference."""
        if isinstance(grad, Tensor) or grad.x.dtype == torch.float64:
            return super().form(grad, out)
        out = grad.x.new_empty(grad.x.shape) if out is None else out
        self._ops.form(*grad, out)
        return out


def _vectors(number: int, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=accumulation_dtype(x)) for _ in range(number))


def _in_tiles(x: Tensor, conv: Convolution, backward: bool = False) -> bool:
    """Whether the compiled tiles take this convolution."""
    if x.dtype != torch.bfloat16:
        return x.dtype == torch.float32
    return conv.pointwise and (backward or conv.bias is None)


def _by_tap(weight: Tensor) -> Tensor:
    """[O, C, *kernel] as [taps * O, C]."""
    return weight.flatten(2).permute(2, 0, 1).flatten(0, 1).contiguous()


#: Whether vectors that are not full cost oneDNN no more: it masks what is not there.
_HAS_MASKS = torch.backends.cpu.get_cpu_capability() == "AVX512"


def _fills_vectors(conv: Convolution) -> bool:
    """Whether oneDNN's convolution is the faster one, and the only one along three axes."""
    return _HAS_MASKS or conv.weight.shape[0] % 16 == 0 or len(conv.space.size) == 3


def _geometry(conv: Convolution) -> list[int]:
    return _three(conv.space.size) + _three(conv.weight.shape[2:]) + [conv.dilation]


def _windows(pooling: Pooling, space: Space) -> list[int]:
    return _three(space.size) + _three(pooling.step)


def _three(sizes: tuple[int, ...]) -> list[int]:
    """Sizes along depth, height and width; 1 along those that are not there."""
    return [1] * (3 - len(sizes)) + list(sizes)
