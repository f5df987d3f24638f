"""What the tests of the Triton convolutions share: matrices, norms, and what must come of them.

They run in Triton's interpreter, which needs no GPU and is chosen in conftest.py.
`tl.dot` is wrong on bfloat16 there, so that dtype is checked on a GPU only.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
if torch.cuda.is_available():
    pytest.skip("of a machine without a GPU", allow_module_level=True)
from densely.fused.kernels import (
    triton_pointwise,
    triton_spatial,
    triton_spatial_backward,
    triton_tiles,
)
from densely.fused.kernels.operands import Affine, Pending

F16, F32 = torch.float16, torch.float32
#: Of a sum of products of numbers about 1, rounded to the dtype.
ULP = {F16: 2e-3, F32: 3e-6}
VECTORS = {"tensor": None, "bare": "", "scale": "s", "terms": "mab", "all": "smab"}


@pytest.fixture(autouse=True)
def small_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one multiprocessor a program takes several turns, and launches are those of large maps.

    Parts of triton that are imported at the first call look for the interpreter's flag too.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (triton_tiles, triton_pointwise, triton_spatial, triton_spatial_backward):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1)


class Given(NamedTuple):
    """A matrix within a wider one whose other columns hold NaN, its norm, and the normalised x."""

    x: Tensor
    affine: Affine
    act: Tensor


def within(rows: int, columns: int, dtype: torch.dtype, before: int = 3, after: int = 5) -> Tensor:
    """Uninitialised columns of a wider matrix; all of it holds NaN."""
    whole = torch.full((rows, before + columns + after), torch.nan).to(dtype)
    return whole[:, before : before + columns]


def neighbours_are_untouched(matrix: Tensor) -> bool:
    """Whether all columns around those of `within` hold NaN still."""
    whole = matrix._base
    assert whole is not None
    start = matrix.storage_offset()
    others = torch.cat([whole[:, :start], whole[:, start + matrix.shape[1] :]], dim=1)
    return bool(others.isnan().all())


def given(rows: int, channels: int, dtype: torch.dtype, gap: int) -> Given:
    torch.manual_seed(rows + channels)
    x = within(rows, channels, dtype, 0, gap)
    x.copy_(torch.randn(rows, channels))
    vectors = torch.randn(4, channels)
    affine = Affine(*vectors[:3], vectors[3].abs(), True)
    act = torch.addcmul(affine.shift.double(), x.double(), affine.scale.double()).relu().to(dtype)
    return Given(x, affine, act.double())


def check_moments(found: tuple[Tensor, int] | None, out: Tensor) -> None:
    assert found is not None
    parts, tile_rows = found
    assert parts.dtype == F32
    tiles = out.double().split(tile_rows)
    means = torch.stack([tile.mean(0) for tile in tiles])
    apart = torch.stack([(tile - tile.mean(0)).square().sum(0) for tile in tiles])
    torch.testing.assert_close(parts.double(), torch.stack([means, apart], 1), rtol=1e-5, atol=1e-5)


def arriving(rows: int, outputs: int, dtype: torch.dtype, vectors: str | None) -> Tensor | Pending:
    g, x = (torch.randn(rows, outputs + 3).to(dtype)[:, 1 : 1 + outputs] for _ in range(2))
    if vectors is None:
        return g
    return Pending(g, x, *(torch.randn(outputs) if v in vectors else None for v in "smab"))


def formed(grad: Tensor | Pending) -> Tensor:
    if isinstance(grad, Tensor):
        return grad.double()
    value = grad.g.double()
    if grad.scale is not None:
        value = value * grad.scale
    if grad.mean is not None and grad.a is not None and grad.b is not None:
        value = value - grad.a - (grad.x.double() - grad.mean) * grad.b
    return value.to(grad.g.dtype).double()


def totals(
    rows: int, channels: int, dtype: torch.dtype, mode: str, gap: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """For mode "add", "base" or "store": total, base, and what is there before, in float64."""
    total = within(rows, channels, dtype if mode == "store" else F32, 0, gap)
    if mode == "add":
        total.copy_(torch.randn(rows, channels))
        return total, None, total.double()
    if mode == "base":
        base = torch.randn(rows, channels + gap).to(dtype)[:, :channels]
        return total, base, base.double()
    return total, None, torch.zeros(rows, channels).double()


def added(found: tuple[Tensor | None, Tensor]) -> tuple[Tensor | None, Tensor]:
    """The parts of a weight's gradient added up, beside those of the norm's sums."""
    parts, sums = found
    return None if parts is None else parts.sum(0), sums


def check_backward(
    found: tuple[Tensor | None, Tensor], total: Tensor, before: Tensor, mode: str, g: Tensor,
    grad_weight: Tensor | None, x: Given,
) -> None:  # fmt: skip
    g = torch.where(x.act > 0, g, 0.0)
    want = g if mode == "store" else before + x.affine.scale * g
    bound = ULP[total.dtype] * max(1.0, want.abs().max().item())
    torch.testing.assert_close(total.double(), want, rtol=0, atol=bound)
    assert neighbours_are_untouched(total)
    found_weight, parts = found
    sums = torch.stack([g.sum(0), (g * (x.x.double() - x.affine.mean)).sum(0)])
    torch.testing.assert_close(parts.double().sum(0), sums, rtol=1e-4, atol=1e-4)
    if grad_weight is None:
        assert found_weight is None
    else:
        assert found_weight is not None
        assert found_weight.dtype == F32
        torch.testing.assert_close(found_weight.double(), grad_weight, rtol=1e-3, atol=1e-3)


@pytest.fixture
def precisions() -> Iterator[tuple[Any, Any]]:
    """PyTorch's two settings for products of float32, which are put back."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in settings]
    yield settings
    for each, value in zip(settings, before, strict=True):
        each.fp32_precision = value
