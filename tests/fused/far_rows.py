"""Rows beyond the 2^31st element of a matrix, through the Triton kernels in their interpreter.

A matrix whose rows are 24 MB apart takes 6 GB of addresses, and memory for what is touched only.
What kernels make of it must be, bit for bit, what they make of the same rows side by side. Offsets
of 32 bits would fault, or read what is elsewhere: this runs as a program of its own, with Triton's
interpreter chosen, and prints what differs.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from densely.fused.kernels import (
    triton_elementwise,
    triton_pointwise,
    triton_pooling,
    triton_pooling_backward,
    triton_spatial,
)
from densely.fused.kernels.operands import Affine, Pooling, Space

SPACE, STRIDE, CHANNELS, OUTPUTS = Space(2, (12, 10)), 12 << 20, 20, 12
assert (SPACE.rows - 1) * STRIDE > 2**31

#: Makes an uninitialised matrix of so many columns.
Make = Callable[[int], Tensor]


def far(columns: int) -> Tensor:
    return torch.empty(SPACE.rows, STRIDE, dtype=torch.float16)[:, :columns]


def near(columns: int) -> Tensor:
    return torch.empty(SPACE.rows, columns, dtype=torch.float16)


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


def pooling(make: Make, how: Pooling) -> Sequence[Tensor | None]:
    x, dx = rows(make, 5), make(CHANNELS)
    pooled = how.pooled(SPACE).rows
    out = torch.empty(pooled, CHANNELS, dtype=torch.float16)
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
    "average of all": lambda make: pooling(make, Pooling("average", SPACE.size)),
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
