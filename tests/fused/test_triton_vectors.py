"""Triton kernels on a norm's vectors against float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from matrix_cases import DEVICE, Maker, assert_near, exactly, few_programs
from torch import Tensor

from densely.fused.kernels import triton_vectors as vectors
from densely.fused.kernels.operands import NormVectors, Unfinished

__all__ = ["few_programs"]  # a fixture of every test here


@pytest.mark.parametrize("columns", [1, 5, 300])
def test_affine(columns: int) -> None:
    make = Maker()
    weight, bias, mean = (make.normal(columns) for _ in range(3))
    var = make.normal(columns).square()
    strided = torch.stack([weight, bias], 1)[:, 0]
    norm = NormVectors(strided, bias.half(), mean, var, 1e-3, True)
    scale, shift, rstd = vectors.affine(norm)
    r = 1 / np.sqrt(exactly(var) + np.float32(1e-3))
    assert_near(rstd, r)
    assert_near(scale, exactly(weight) * r)
    assert_near(shift, exactly(bias.half()) - exactly(mean) * exactly(weight) * r)


@pytest.mark.parametrize(("rows", "tile_rows"), [(1, 4), (11, 4), (900, 1), (6300, 3)])
def test_moments_are_combined(rows: int, tile_rows: int) -> None:
    x = exactly(Maker().normal(rows, 11)) + 100 * np.linspace(0, 1, rows)[:, None] ** 3
    tiles = [x[i : i + tile_rows] for i in range(0, rows, tile_rows)]
    parts = np.stack([[t.mean(0), ((t - t.mean(0)) ** 2).sum(0)] for t in tiles])
    mean, var = (torch.full((11,), math.nan, device=DEVICE) for _ in range(2))
    partials = torch.from_numpy(parts).float().to(DEVICE)
    vectors.finish_moments(partials, tile_rows, rows, mean, var)
    assert_near(mean, x.mean(0))
    assert_near(var, x.var(0))


@pytest.mark.parametrize(("old", "rows", "tile_rows"), [(0, 11, 4), (5, 900, 1), (300, 2100, 1)])
def test_moments_of_the_last_channels_are_finished_for_a_norm(
    old: int, rows: int, tile_rows: int
) -> None:
    make = Maker()
    x = exactly(make.normal(rows, 11)) + 3
    tiles = [x[i : i + tile_rows] for i in range(0, rows, tile_rows)]
    parts = np.stack([[t.mean(0), ((t - t.mean(0)) ** 2).sum(0)] for t in tiles])
    columns = old + 11
    weight, bias, mean, var = (1 + torch.rand(columns, device=DEVICE) for _ in range(4))
    expected_mean = np.concatenate([exactly(mean)[:old], x.mean(0)])
    expected_var = np.concatenate([exactly(var)[:old], x.var(0)])
    mean[old:], var[old:] = math.nan, math.nan
    partials = torch.from_numpy(parts).float().to(DEVICE)
    after = Unfinished(partials, tile_rows, rows, mean[old:], var[old:])
    found = vectors.affine(NormVectors(weight, bias, mean, var, 1e-3, True), after)
    r = 1 / np.sqrt(expected_var + 1e-3)
    scale = exactly(weight) * r
    for value, wanted in zip(
        (mean, var, *found),
        (expected_mean, expected_var, scale, exactly(bias) - expected_mean * scale, r),
        strict=True,
    ):
        assert_near(value, wanted)


def test_programs_of_channels_whose_moments_are_known_leave_the_last_ones_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other programs write those, perhaps before."""
    original = vectors.launch

    def old_ones(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **options: Any) -> None:
        original(kernel, args[-1:], x, *args, **options)

    monkeypatch.setattr(vectors, "launch", old_ones)
    weight, bias, mean, var = torch.rand(4, 16, device=DEVICE)
    after = Unfinished(torch.ones(3, 2, 11, device=DEVICE), 4, 12, mean[5:], var[5:])
    out = torch.full((3, 16), -1.0, device=DEVICE)
    vectors.affine(NormVectors(weight, bias, mean, var, 1e-3, True), after, out)
    assert (out[:, 5:] == -1).all()
    assert (out[[0, 2], :5] > 0).all()


def test_millions_of_parts_do_not_ask_for_more_programs_than_a_second_axis_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(vectors, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    parts = 65_536 * 64
    partials = torch.empty(1, 2, 3, device=DEVICE).expand(parts, 2, 3)
    vectors.finish_moments(partials, 64, 64 * parts, *torch.empty(2, 3, device=DEVICE))
    vectors.finish_norm(partials, Maker().affine(3), 64 * parts)
    assert len(grids) == 4
    assert all(programs <= 65_535 for grid in grids for programs in grid[1:])


@pytest.mark.parametrize("parts", [1, 7, 513, 2100])
@pytest.mark.parametrize("training", [True, False])
def test_sums_of_a_norm_are_finished(parts: int, training: bool) -> None:
    make = Maker()
    partials, affine = make.normal(parts, 2, 19), make.affine(19, training)
    sums = exactly(partials).sum(0)
    rstd, over_rows = exactly(affine.rstd), exactly(affine.scale) / 1000
    weights = make.normal(1 + parts % 11, 5, 3, 17)
    norm, terms, weight = vectors.finish_norm(partials, affine, 1000, None, weights)
    assert weight is not None
    assert weight.shape == (5, 3, 17)
    assert_near(weight, exactly(weights).sum(0))
    assert_near(norm.bias, sums[0])
    assert_near(norm.weight, sums[1] * rstd)
    assert (terms is not None) == training
    given = (torch.ones(40, device=DEVICE)[3:22], torch.ones(19, device=DEVICE))
    assert vectors.finish_norm(partials, affine, 1000, given).weight is None
    expected = (over_rows * sums[0], over_rows * rstd**2 * sums[1])
    for i, value in enumerate(expected):
        assert_near(given[i], 1 + value if training else np.ones(19))
        if terms is not None:
            assert_near(terms[i], value)
