"""Random matrices and vectors for the tests of Triton kernels, in its interpreter without a GPU."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from densely.fused.kernels.operands import Affine

pytest.importorskip("triton", reason="needs Triton")
from densely.fused.kernels import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program takes several turns where the matrices are small."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_kernels.triton_elementwise, "multiprocessors", lambda device: 1)


class Maker:
    """Random matrices, and poisoned ones for results; all are columns of wider ones."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(DEVICE, dtype)

    def matrix(self, rows: int, columns: int, stride: int, dtype: torch.dtype) -> Tensor:
        return (self.normal(rows, stride) + 0.5).to(dtype)[:, :columns]

    def affine(self, columns: int, training: bool = True) -> Affine:
        vector = [self.normal(columns) for _ in range(3)]
        return Affine(*vector, self.normal(columns).abs() + 0.5, training)


def poisoned(
    rows: int, columns: int, stride: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A matrix that shows what is written: its first columns, and all of it."""
    whole = torch.full((rows, stride), math.nan, dtype=dtype, device=DEVICE)
    return whole[:, :columns], whole


def exactly(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def assert_near(got: Tensor, expected: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
    """Up to a few roundings, relative to the largest value; a NaN is never near."""
    error = np.abs(exactly(got) - expected).max()
    assert error <= 40 * torch.finfo(dtype).eps * max(1.0, np.abs(expected).max()), error


def assert_untouched(whole: Tensor, columns: int) -> None:
    assert whole[:, columns:].isnan().all()


def activated(x: Tensor, affine: Affine) -> Tensor:
    """relu(x * scale + shift), rounded as maps are: x with the mask that all kernels must have."""
    y = torch.addcmul(affine.shift.double(), x.double(), affine.scale.double())
    return y.clamp_min(0).to(x.dtype)
