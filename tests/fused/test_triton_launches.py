"""What launches that are tried in place of the usual ones are compared by."""

import pytest
import torch
from matrix_cases import DEVICE, Maker, assert_near, exactly

from densely.fused.kernels import triton_launches


@pytest.mark.parametrize("rows", [64, 70, 5])
def test_moments_are_those_of_all_rows_where_the_last_tile_is_not_full(rows: int) -> None:
    x = Maker().normal(rows, 3) + 2
    tiles = x.double().split(16)
    parts = torch.stack([torch.stack((t.mean(0), (t - t.mean(0)).square().sum(0))) for t in tiles])
    mean, variance = triton_launches.moments_of((parts.float().to(DEVICE), 16), rows)
    assert_near(mean, exactly(x).mean(0))
    assert_near(variance, exactly(x).var(0))


def test_without_moments_there_is_nothing_to_compare() -> None:
    assert triton_launches.moments_of(None, 64) == []
