"""Triton kernels that pass over a matrix against float64."""

import math

import numpy as np
import pytest
import torch
from matrix_cases import (
    DEVICE,
    Maker,
    activated,
    assert_near,
    assert_untouched,
    exactly,
    few_programs,
    poisoned,
)
from torch import Tensor

from densely.fused.kernels import triton_elementwise as elementwise
from densely.fused.kernels import triton_vectors as vectors
from densely.fused.kernels.operands import Pending

__all__ = ["few_programs"]  # a fixture of every test here

F16, F32 = torch.float16, torch.float32
#: Rows, columns, how far rows are apart, and dtype: one value, tails, units of 1, 4 and 8.
MATRICES = [
    (1, 1, 1, F32),
    (7, 5, 9, F16),
    (133, 28, 40, F16),
    (50, 28, 40, F32),
    (70, 130, 138, F32),
    (200, 64, 64, F16),
]
every_matrix = pytest.mark.parametrize(("rows", "columns", "stride", "dtype"), MATRICES)


@every_matrix
def test_norm_relu(rows: int, columns: int, stride: int, dtype: torch.dtype) -> None:
    make = Maker()
    x, affine = make.matrix(rows, columns, stride, dtype), make.affine(columns)
    out, whole = poisoned(rows, columns, stride + 3, dtype)
    elementwise.norm_relu(x, affine, out)
    y = exactly(x) * exactly(affine.scale) + exactly(affine.shift)
    assert_near(out, np.maximum(y, 0), dtype)
    assert_untouched(whole, columns)


@every_matrix
def test_moments(rows: int, columns: int, stride: int, dtype: torch.dtype) -> None:
    x = Maker().matrix(rows, columns, stride, dtype)
    x[:, 0] += 100
    partials, tile_rows = elementwise.moments(x)
    assert (partials.shape[0] - 1) * tile_rows < rows <= partials.shape[0] * tile_rows
    first = exactly(x[:tile_rows])
    assert_near(partials[0, 0], first.mean(0))
    assert_near(partials[0, 1], ((first - first.mean(0)) ** 2).sum(0))
    mean, var = (torch.full((columns,), math.nan, device=DEVICE) for _ in range(2))
    vectors.finish_moments(partials, tile_rows, rows, mean, var)
    assert_near(mean, exactly(x).mean(0))
    assert_near(var, exactly(x).var(0))
    out, whole = poisoned(rows, columns, stride + 8, dtype)
    again, _ = elementwise.moments(x, out)
    assert torch.equal(out, x)
    assert_untouched(whole, columns)
    assert_near(again, exactly(partials))


@every_matrix
@pytest.mark.parametrize("way", ["store", "add", "add to base"])
def test_norm_relu_backward(
    rows: int, columns: int, stride: int, dtype: torch.dtype, way: str
) -> None:
    make = Maker()
    x, affine = make.matrix(rows, columns, stride, dtype), make.affine(columns)
    g = make.matrix(rows, columns, columns, dtype)
    kind = dtype if way == "store" else torch.float32
    total, whole = poisoned(rows, columns, stride + 8, kind)
    base = make.matrix(rows, columns, stride, dtype) if way == "add to base" else None
    if way == "add":
        total.copy_(make.matrix(rows, columns, columns, kind))
    before = {"store": 0.0, "add": exactly(total), "add to base": base}[way]
    before = exactly(before) if isinstance(before, Tensor) else before
    partials = elementwise.norm_relu_backward(g, x, affine, total, base, way != "store")
    up = np.where(exactly(activated(x, affine)) > 0, exactly(g), 0)
    factor = 1.0 if way == "store" else exactly(affine.scale)
    assert_near(total, before + factor * up, kind)
    assert_untouched(whole, columns)
    sums = partials.double().sum(0)
    assert_near(sums[0], up.sum(0))
    assert_near(sums[1], (up * (exactly(x) - exactly(affine.mean))).sum(0))


@every_matrix
@pytest.mark.parametrize("of", ["all", "scale", "mean", "nothing"])
def test_form(rows: int, columns: int, stride: int, dtype: torch.dtype, of: str) -> None:
    make = Maker()
    g = make.matrix(rows, columns, stride + 4, torch.float32 if of == "mean" else dtype)
    x = make.matrix(rows, columns, stride, dtype)
    scale, mean, a, b = (make.normal(columns) for _ in range(4))
    pending = Pending(
        g, x, scale if of in ("all", "scale") else None,
        *((mean, a, b) if of in ("all", "mean") else (None, None, None)),
    )  # fmt: skip
    expected = exactly(g) * (1 if pending.scale is None else exactly(scale))
    if pending.mean is not None:
        expected = expected - exactly(a) - (exactly(x) - exactly(mean)) * exactly(b)
    out, whole = poisoned(rows, columns, stride + 1, dtype)
    elementwise.form(pending, out)
    assert_near(out, expected, dtype)
    assert_untouched(whole, columns)


def test_what_is_not_finite_is_kept() -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]], device=DEVICE)
    affine = Maker().affine(4)._replace(scale=torch.ones(4, device=DEVICE))
    out, _ = poisoned(1, 4, 4)
    elementwise.norm_relu(x, affine, out)
    assert out[0].tolist()[:3] == pytest.approx([math.nan, math.inf, 0.0], nan_ok=True)


def test_two_runs_give_the_same_bits() -> None:
    make = Maker()
    x, g = make.matrix(300, 24, 32, torch.float32), make.matrix(300, 24, 24, torch.float32)
    affine = make.affine(24)
    found = []
    for _ in range(2):
        total, _ = poisoned(300, 24, 24)
        partials = elementwise.norm_relu_backward(g, x, affine, total, None, False)
        found.append((total, *vectors.finish_norm(partials, affine, 300).norm))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
