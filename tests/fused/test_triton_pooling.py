"""Triton kernels that pool against float64."""

import itertools
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

from densely.fused.kernels import triton_pooling as pooling
from densely.fused.kernels import triton_pooling_backward as pooling_backward
from densely.fused.kernels.operands import Affine, NormGradient, Pooling, Space

__all__ = ["few_programs"]  # a fixture of every test here

POOLINGS = {
    "average": [
        ((2, 2), (6, 5)), ((2, 2), (2, 3)), ((1, 3), (4, 7)), ((1, 1), (3, 3)), ((3, 3), (7, 8)),
        ((5, 7), (5, 7)), ((4, 4), (9, 8)), ((3,), (10,)), ((2,), (9,)), ((37,), (37,)),
    ],
    "max": [
        ((2, 2), (7, 6)), ((1, 1), (4, 5)), ((2, 1), (5, 4)), ((3, 4), (8, 11)), ((2, 2), (1, 1)),
        ((1, 2), (1, 9)), ((2,), (9,)), ((1,), (6,)),
    ],
}  # fmt: skip
every_pooling = pytest.mark.parametrize(
    ("kind", "step", "size"),
    [(kind, *case) for kind, cases in POOLINGS.items() for case in cases],
)


def windows(kind: str, step: tuple[int, ...], space: Space) -> list[list[int]]:
    """For each row of the result, the rows of its window in order."""
    numbers = np.arange(space.rows).reshape(space.batch, *space.size)
    found = []
    for image, *at in np.ndindex(space.batch, *Pooling(kind, step).pooled(space).size):
        if kind == "average":
            axes = [range(o * s, (o + 1) * s) for o, s in zip(at, step, strict=True)]
        else:
            axes = [
                [i for i in range(o * s - 1, o * s + 2) if 0 <= i < n]
                for o, s, n in zip(at, step, space.size, strict=True)
            ]
        found.append([int(numbers[image, *place]) for place in itertools.product(*axes)])
    return found


def pooled(act: np.ndarray, kind: str, of: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The result, and the shares [pooled rows, rows, C] that rows have in it."""
    result = np.zeros((len(of), act.shape[1]))
    shares = np.zeros((len(of), *act.shape))
    for o, rows in enumerate(of):
        values = act[rows]
        if kind == "average":
            result[o], shares[o, rows] = values.mean(0), 1 / len(rows)
        else:
            first = values.argmax(0)  # of equal ones the first
            result[o] = values.max(0)
            shares[o, np.array(rows)[first], np.arange(act.shape[1])] = 1
    return result, shares


@every_pooling
@pytest.mark.parametrize(("columns", "training"), [(5, True), (24, False)])
def test_pool(
    kind: str, step: tuple[int, ...], size: tuple[int, ...], columns: int, training: bool
) -> None:
    dtype = torch.float16 if columns == 24 else torch.float32
    make, space, how = Maker(), Space(2, size), Pooling(kind, step)  # type: ignore[arg-type]
    x = make.matrix(space.rows, columns, columns + 8, dtype)
    x.mul_(2).round_()  # few values, so that maxima are equal
    affine = make.affine(columns, training)
    act = exactly(activated(x, affine))
    expected, shares = pooled(act, kind, windows(kind, step, space))
    rows = how.pooled(space).rows
    out, whole = poisoned(rows, columns, columns + 8, dtype)
    choice = torch.full((rows, columns), 99, dtype=torch.uint8, device=DEVICE)
    pooling.pool(x, affine, how, space, out, choice if kind == "max" else None)
    assert_near(out, expected, dtype)
    assert_untouched(whole, columns)

    grad = make.normal(rows, columns, dtype=dtype)
    dx, whole = poisoned(space.rows, columns, columns + 8, dtype)
    norm = pooling_backward.pool_backward(grad, choice, x, affine, how, space, dx)
    up = np.where(act > 0, np.einsum("oc,orc->rc", exactly(grad), shares), 0)
    check_norm_backward(norm, dx, up, x, affine, dtype)
    assert_untouched(whole, columns)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["max", "average"])
def test_many_rows_are_pooled(kind: str, training: bool) -> None:
    """A program's turns go over the ends of lines and images."""
    make, space, how = Maker(), Space(3, (16, 18)), Pooling(kind, (2, 2))  # type: ignore[arg-type]
    x, affine = make.matrix(space.rows, 3, 3, torch.float32), make.affine(3, training)
    maps = activated(x, affine).view(3, 16, 18, 3).permute(0, 3, 1, 2).double()
    maps = maps.detach().requires_grad_()
    if kind == "max":
        expected = torch.nn.functional.max_pool2d(maps, 3, 2, 1)
    else:
        expected = torch.nn.functional.avg_pool2d(maps, 2)
    rows = how.pooled(space).rows
    out, _ = poisoned(rows, 3, 3)
    choice = torch.zeros(rows, 3, dtype=torch.uint8, device=DEVICE)
    pooling.pool(x, affine, how, space, out, choice)
    assert_near(out, exactly(how.pooled(space).matrix(expected.detach())))
    grad = make.normal(rows, 3)
    (up,) = torch.autograd.grad(expected, maps, how.pooled(space).maps(grad).double())
    dx, _ = poisoned(space.rows, 3, 3)
    norm = pooling_backward.pool_backward(grad, choice, x, affine, how, space, dx)
    check_norm_backward(norm, dx, exactly(space.matrix(torch.where(maps > 0, up, 0.0))), x, affine)


def check_norm_backward(
    norm: NormGradient,
    dx: Tensor,
    up: np.ndarray,
    x: Tensor,
    affine: Affine,
    dtype: torch.dtype = torch.float32,
) -> None:
    """What comes of the gradient `up` of normalised rows, masked where relu was zero."""
    center = exactly(x) - exactly(affine.mean)
    assert_near(norm.bias, up.sum(0))
    assert_near(norm.weight, (up * center).sum(0) * exactly(affine.rstd))
    expected = up * exactly(affine.scale)
    if affine.training:
        over_rows = exactly(affine.scale) / x.shape[0]
        expected -= over_rows * up.sum(0)
        expected -= center * over_rows * exactly(affine.rstd) ** 2 * (up * center).sum(0)
    assert_near(dx, expected, dtype)


def vectors(scale: float, shift: float) -> Affine:
    """For one column, in train mode."""
    return Affine(*torch.tensor([[scale], [shift], [0.0], [1.0]], device=DEVICE), True)


def test_of_values_that_are_equal_when_rounded_the_first_is_the_maximum() -> None:
    """2 and 2 + 2^-10, which in float16 is 2."""
    x = torch.tensor([[1.0], [1 + 2**-10]], dtype=torch.float16, device=DEVICE)
    space, how, affine = Space(1, (2,)), Pooling("max", (2,)), vectors(1, 1)
    affine = affine._replace(training=False)
    out = torch.empty(1, 1, dtype=torch.float16, device=DEVICE)
    choice = torch.full((1, 1), 99, dtype=torch.uint8, device=DEVICE)
    pooling.pool(x, affine, how, space, out, choice)
    dx = torch.empty_like(x)
    pooling_backward.pool_backward(torch.ones_like(out), choice, x, affine, how, space, dx)
    assert out.item() == 2
    assert dx.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("step", [(3, 3), (4, 4)])
def test_averages_are_of_rounded_values_in_both_ways(step: tuple[int, int]) -> None:
    """The mean is 2 + 2^-9 / 4 or less; of values that were not rounded it would be the next."""
    places = math.prod(step)
    x = torch.full((places, 1), 1 + 2**-10, dtype=torch.float16, device=DEVICE)
    x[: places // 4] = 1 + 2**-9
    space, how, affine = Space(1, step), Pooling("average", step), vectors(1, 1)
    out, again = (torch.empty(1, 1, dtype=torch.float16, device=DEVICE) for _ in range(2))
    pooling.pool(x, affine, how, space, out, None)
    grad, none, dx = torch.ones_like(out), torch.empty(0), torch.empty_like(x)
    pooling_backward.pool_backward(grad, none, x, affine, how, space, dx, again)
    assert (out.item(), again.item()) == (2, 2)


def test_what_is_zero_only_when_rounded_has_no_gradient() -> None:
    x, space, how = torch.ones(9, 1, device=DEVICE).half(), Space(1, (3, 3)), (3, 3)
    grad, none, dx = torch.ones(1, 1, device=DEVICE).half(), torch.empty(0), torch.empty_like(x)
    norm = pooling_backward.pool_backward(
        grad, none, x, vectors(2**-26, 0), Pooling("average", how), space, dx
    )
    assert not any(made.any() for made in (*norm, dx))


def test_a_maximum_that_is_not_a_number_spreads() -> None:
    space, how = Space(1, (6, 6)), Pooling("max", (2, 2))
    x = Maker().matrix(36, 3, 3, torch.float32)
    x[14, 1] = math.nan
    affine = Maker().affine(3)
    out, _ = poisoned(9, 3, 3)
    choice = torch.zeros(9, 3, dtype=torch.uint8, device=DEVICE)
    pooling.pool(x, affine, how, space, out, choice)
    maps = activated(x, affine).view(1, 6, 6, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.max_pool2d(maps, 3, 2, 1).permute(0, 2, 3, 1).reshape(9, 3)
    assert np.array_equal(np.isnan(exactly(out)), np.isnan(exactly(expected)))
    assert out.isnan().any()
