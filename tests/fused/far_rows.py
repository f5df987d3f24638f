"""Rows beyond the 2^31st element of a matrix, through the Triton kernels in their interpreter.

A matrix whose rows are 24 MB apart, or further where they are fewer, takes 6 GB of addresses, and
memory for what is touched only. What kernels make of it must be, bit for bit, what they make of the
same rows side by side. Offsets of 32 bits would fault, or read what is elsewhere: this runs as a
program of its own, with Triton's interpreter chosen, and prints what differs.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from densely.fused.kernels import (
    triton_elementwise,
    triton_image_stem,
    triton_pointwise,
    triton_pooling,
    triton_pooling_backward,
    triton_spatial,
)
from densely.fused.kernels.operands import Affine, FirstConvolution, Pending, Pooling, Space

SPACE, STRIDE, CHANNELS, OUTPUTS = Space(2, (12, 10)), 12 << 20, 20, 12
assert (SPACE.rows - 1) * STRIDE > 2**31


class Make(Protocol):
    """Makes an uninitialised matrix."""

    def __call__(self, columns: int, rows: int = SPACE.rows) -> Tensor: ...


def far(columns: int, rows: int = SPACE.rows) -> Tensor:
    return torch.empty(rows, SPACE.rows * STRIDE // rows, dtype=torch.float16)[:, :columns]


def near(columns: int, rows: int = SPACE.rows) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.float16)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


AFFINE = Affine(*(normal(CHANNELS, seed=seed) for seed in range(4)), True)


def rows(make: Make, seed: int, columns: int = CHANNELS) -> Tensor:
    return make(columns).copy_(normal(SPACE.rows, columns, seed=seed))


def pointwise(make: Make) -> Sequence[Tensor | None]:
    x, weight = rows(make, 5), normal(OUTPUTS, CHANNELS, seed=6).half()
    out, total = make(OUTPUTS), make(CHANNELS)
    triton_pointwise.forward(x, AFFINE, weight, None, out, False)
    grad, base = rows(near, 7, OUTPUTS), rows(make, 8)
    parts = triton_pointwise.backward(grad, x, AFFINE, weight, True, total, base, True)
    return out, total, *parts


def spatial(make: Make) -> Sequence[Tensor | None]:
    x, weight = rows(make, 5), normal(OUTPUTS, CHANNELS, 3, 3, seed=6).half()
    out, total = make(OUTPUTS), make(CHANNELS)
    triton_spatial.forward(x, AFFINE, weight, None, 1, SPACE, out, False)
    grad = rows(near, 7, OUTPUTS)
    parts = triton_spatial.backward(grad, x, AFFINE, weight, 1, SPACE, True, total, None, False)
    return out, total, *parts


def elementwise(make: Make) -> Sequence[Tensor | None]:
    x, out, total = rows(make, 5), make(CHANNELS), make(CHANNELS)
    triton_elementwise.norm_relu(x, AFFINE, out)
    parts = triton_elementwise.norm_relu_backward(rows(make, 7), x, AFFINE, total, None, False)
    return out, total, parts, triton_elementwise.moments(x, make(CHANNELS))[0]


def form(make: Make) -> Sequence[Tensor | None]:
    out = make(CHANNELS)
    triton_elementwise.form(Pending(rows(make, 5), rows(make, 6), *AFFINE[:4]), out)
    return (out,)


def image_stem(make: Make) -> Sequence[Tensor | None]:
    """A convolution of 1x1 with a stride that leaves out all but four pixels of an image."""
    apart = 2**14 if make is far else 1
    size = (2 * apart, 2 * apart)
    images = torch.empty(3, *size, dtype=torch.float16)
    images[:, ::apart, ::apart] = normal(3, 2, 2, seed=5)
    matrix, weight = images.view(-1, 1), normal(OUTPUTS, 1, 1, 1, seed=6).half()
    conv, how = FirstConvolution(weight, (apart, apart), Space(3, size)), Pooling("max", (1, 1))
    affine = Affine(*(normal(OUTPUTS, seed=seed) for seed in range(4)), True)
    mean, var, sums = torch.empty(OUTPUTS), torch.empty(OUTPUTS), torch.empty(OUTPUTS + 1, 1)
    triton_image_stem.moments(matrix, conv, (mean, var), sums)
    out = near(OUTPUTS, conv.made.rows)
    choice = torch.empty(out.shape, dtype=torch.uint8)
    triton_image_stem.pool(matrix, conv, affine, how, out, choice)
    grad = normal(*out.shape, seed=7).half()
    to_weight, norm = triton_image_stem.backward(grad, choice, sums, matrix, conv, affine, how)
    return mean, var, sums, out, choice, to_weight, *norm


def pooling(make: Make, how: Pooling) -> Sequence[Tensor | None]:
    x, dx = rows(make, 5), make(CHANNELS)
    pooled = how.pooled(SPACE).rows
    out = make(CHANNELS, pooled)
    choice = torch.zeros(pooled, CHANNELS, dtype=torch.uint8)
    triton_pooling.pool(x, AFFINE, how, SPACE, out, choice if how.kind == "max" else None)
    grad = normal(pooled, CHANNELS, seed=7).half()
    norm = triton_pooling_backward.pool_backward(grad, choice, x, AFFINE, how, SPACE, dx)
    return out, dx, *norm


CALLS: dict[str, Callable[[Make], Sequence[Tensor | None]]] = {
    "1x1": pointwise,
    "3x3": spatial,
    "element-wise": elementwise,
    "maximum": lambda make: pooling(make, Pooling("max", (2, 2))),
    "average": lambda make: pooling(make, Pooling("average", (2, 2))),
    "average of 16": lambda make: pooling(make, Pooling("average", (4, 4))),
    "average of all": lambda make: pooling(make, Pooling("average", SPACE.size)),
    "gradient": form,
    "image stem": image_stem,
}


if __name__ == "__main__":
    try:
        [far(1) for _ in range(4)]
    except RuntimeError as error:
        sys.exit(f"no room: {error}")
    for name, call in CALLS.items():
        for i, (one, other) in enumerate(zip(call(far), call(near), strict=True)):
            assert one is not None
            assert other is not None
            if not torch.equal(one, other):
                print(f"{name}: result {i} differs")
