"""The Triton convolutions against float64 products, in Triton's interpreter, which needs no GPU.

The interpreter must be chosen before triton is imported; nothing else in these tests imports it.
In the interpreter `tl.dot` is wrong on bfloat16, so that dtype is checked on a GPU only.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")  # read when kernels are defined
    from triton.runtime.interpreter import InterpretedFunction

    from densely.fused.kernels import (
        triton_kernels,
        triton_pointwise,
        triton_spatial,
        triton_spatial_backward,
        triton_tiles,
    )
from densely.fused.kernels.operands import Affine, Convolution, Pending, Space

if not isinstance(triton_pointwise._forward_kernel, InterpretedFunction):
    pytest.skip("triton was imported without its interpreter", allow_module_level=True)

F16, F32 = torch.float16, torch.float32
#: Of a sum of products of numbers about 1, rounded to the dtype.
ULP = {F16: 2e-3, F32: 3e-6}
VECTORS = {"tensor": None, "bare": "", "scale": "s", "terms": "mab", "all": "smab"}


@pytest.fixture(autouse=True)
def _on_a_small_chip(monkeypatch: pytest.MonkeyPatch) -> None:
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


POINTWISE = [
    # rows, C, O, dtype, columns beyond C, bias, gradient, mode, whether the weight is trained
    (200, 20, 12, F32, 4, False, "tensor", "add", True),
    (130, 24, 48, F16, 24, True, "all", "base", True),
    (77, 130, 130, F16, 6, False, "scale", "store", True),
    (65, 7, 7, F32, 0, True, "terms", "store", False),
    (97, 33, 7, F16, 3, True, "bare", "add", True),
    (70, 64, 40, F32, 0, True, "all", "add", False),
    (1, 12, 16, F16, 4, False, "terms", "base", True),
    (64, 200, 128, F16, 56, False, "all", "add", True),
    (128, 75, 24, F16, 5, True, "tensor", "add", True),
]


@pytest.mark.parametrize(
    ("rows", "channels", "outputs", "dtype", "gap", "with_bias", "kind", "mode", "trained"),
    POINTWISE,
)
def test_pointwise(
    rows: int, channels: int, outputs: int, dtype: torch.dtype, gap: int, with_bias: bool,
    kind: str, mode: str, trained: bool,
) -> None:  # fmt: skip
    x = given(rows, channels, dtype, gap)
    weight = (torch.randn(outputs, channels) / channels**0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    out = within(rows, outputs, dtype)
    moments = triton_pointwise.forward(x.x, x.affine, weight, bias, out, True)
    want = x.act @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(out.double(), want, rtol=ULP[dtype], atol=ULP[dtype])
    assert neighbours_are_untouched(out)
    check_moments(moments, out)

    grad = arriving(rows, outputs, dtype, VECTORS[kind])
    total, base, before = totals(rows, channels, dtype, mode, gap)
    found = triton_pointwise.backward(
        grad, x.x, x.affine, weight, trained, total, base, mode != "store"
    )
    g = formed(grad)
    grad_weight = g.T @ x.act if trained else None
    check_backward(added(found), total, before, mode, g @ weight.double(), grad_weight, x)


SPATIAL = [
    # batch, H and W, C, O, window, dilation, dtype, columns beyond C, bias, mode, trained
    (2, (9, 7), 20, 12, (3, 3), 1, F16, 4, False, "add", True),
    (1, (8, 8), 24, 7, (3, 3), 2, F16, 0, True, "store", True),
    (1, (5, 9), 7, 12, (3, 3), 1, F32, 5, True, "base", True),
    (1, (6, 5), 70, 40, (3, 3), 1, F16, 2, False, "base", False),
    (2, (40,), 9, 5, (3,), 20, F16, 1, False, "add", True),
    (1, (6, 20), 9, 5, (5, 3), 1, F16, 0, False, "store", True),
    (3, (1, 1), 66, 70, (3, 3), 1, F16, 0, True, "store", True),
    (2, (3, 3), 96, 32, (3, 3), 1, F16, 32, False, "add", True),
    (1, (11, 13), 16, 48, (3, 3), 1, F16, 0, False, "store", True),
    (1, (4, 70), 8, 32, (1, 3), 3, F16, 0, True, "add", True),
    (2, (8, 16), 40, 32, (3, 3), 1, F16, 0, False, "base", True),
    (1, (7, 9), 64, 16, (3, 3), 1, F16, 8, True, "add", True),
    (2, (10, 12), 24, 12, (3, 3), 1, F16, 8, False, "add", True),
]


@pytest.mark.parametrize(
    ("batch", "size", "channels", "outputs", "window", "dilation", "dtype", "gap", "with_bias",
     "mode", "trained"),
    SPATIAL,
)  # fmt: skip
def test_spatial(
    batch: int, size: tuple[int, ...], channels: int, outputs: int, window: tuple[int, ...],
    dilation: int, dtype: torch.dtype, gap: int, with_bias: bool, mode: str, trained: bool,
) -> None:  # fmt: skip
    space = Space(batch, size)
    x = given(space.rows, channels, dtype, gap)
    fan_in = channels * 9
    weight = (torch.randn(outputs, channels, *window) / fan_in**0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    out = within(space.rows, outputs, dtype)
    moments = triton_spatial.forward(x.x, x.affine, weight, bias, dilation, space, out, True)

    maps = space.maps(x.act).clone().requires_grad_()
    exact_weight = weight.double().requires_grad_()
    convolve = F.conv1d if len(size) == 1 else F.conv2d
    padding = [dilation * (k // 2) for k in window]
    y = convolve(maps, exact_weight, None if bias is None else bias.double(), 1, padding, dilation)
    want = space.matrix(y.detach())
    torch.testing.assert_close(out.double(), want, rtol=ULP[dtype], atol=ULP[dtype])
    assert neighbours_are_untouched(out)
    check_moments(moments, out)

    grad = torch.randn(space.rows, outputs).to(dtype)
    total, base, before = totals(space.rows, channels, dtype, mode, gap)
    found = triton_spatial.backward(
        grad, x.x, x.affine, weight, dilation, space, trained, total, base, mode != "store"
    )
    g, grad_weight = torch.autograd.grad(y, (maps, exact_weight), space.maps(grad.double()))
    if found[0] is not None:
        found = (found[0].permute(0, 1, 4, 2, 3).flatten(3).unflatten(3, window), found[1])
    check_backward(
        added(found), total, before, mode, space.matrix(g), grad_weight if trained else None, x
    )


@pytest.fixture
def _settings_put_back() -> Iterator[None]:
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [each.fp32_precision for each in settings]
    yield
    for each, value in zip(settings, before, strict=True):
        each.fp32_precision = value


@pytest.mark.usefixtures("_settings_put_back")
@pytest.mark.parametrize("convolutions", ["tf32", "ieee"])
@pytest.mark.parametrize("products", ["tf32", "ieee"])
def test_float32_is_rounded_to_tf32_where_both_settings_allow_it(
    products: str, convolutions: str
) -> None:
    """The launches are other ones then; the interpreter's products are exact all the same."""
    torch.backends.cuda.matmul.fp32_precision = products
    torch.backends.cudnn.conv.fp32_precision = convolutions
    allowed = (products, convolutions) == ("tf32", "tf32")
    assert triton_tiles.precision(torch.empty(1)) == ("tf32" if allowed else "ieee")
    assert triton_tiles.exact(torch.empty(1)) != allowed
    assert triton_tiles.precision(torch.empty(1, dtype=F16)) == "ieee"
    if allowed:
        test_pointwise(*POINTWISE[0])
        test_spatial(*SPATIAL[2])


def test_without_moments_there_are_none() -> None:
    x = given(20, 6, F32, 2)
    weight, out = torch.randn(3, 6), within(20, 3, F32)
    assert triton_pointwise.forward(x.x, x.affine, weight, None, out, False) is None
    with_window = torch.randn(3, 6, 3, 3)
    space = Space(1, (4, 5))
    assert triton_spatial.forward(x.x, x.affine, with_window, None, 1, space, out, False) is None


def test_an_empty_batch_has_sums_of_zero() -> None:
    x, space = given(0, 8, F32, 0), Space(0, (4, 5))
    weight, out, total = torch.randn(3, 8, 3, 3), torch.empty(0, 3), torch.empty(0, 8)
    triton_spatial.forward(x.x, x.affine, weight, None, 1, space, out, False)
    flat = weight[:, :, 0, 0]
    triton_pointwise.forward(x.x, x.affine, flat, None, out, False)
    for found in (
        triton_spatial.backward(out, x.x, x.affine, weight, 1, space, True, total, None, False),
        triton_pointwise.backward(out, x.x, x.affine, flat, True, total, None, False),
    ):
        assert all(tensor is not None and not tensor.any() for tensor in found)


def test_a_nan_reaches_the_output_and_no_other_row() -> None:
    x = given(20, 6, F32, 2)
    x.x[7, 2] = torch.nan
    weight, out = torch.randn(3, 6), within(20, 3, F32)
    triton_pointwise.forward(x.x, x.affine, weight, None, out, False)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [7]


def test_a_channel_switched_off_by_an_infinite_shift_adds_nothing_at_borders() -> None:
    x, space = given(20, 6, F32, 2), Space(1, (4, 5))
    x.affine.shift[1] = -torch.inf
    weight, out = torch.randn(3, 6, 3, 3), within(20, 3, F32)
    triton_spatial.forward(x.x, x.affine, weight, None, 1, space, out, False)
    act = torch.relu(x.x * x.affine.scale + x.affine.shift)
    want = space.matrix(F.conv2d(space.maps(act), weight, padding=1))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_lines_too_long_for_the_kernels_run_otherwise() -> None:
    """Places along them are found by reciprocals in float32: see `triton_tiles.divide`."""
    x, affine = torch.randn(2, 8), Affine(*(torch.ones(8) for _ in range(4)), True)
    weight = torch.randn(4, 8, 3)
    for size, there in ((900_000, True), (900_001, False)):
        conv = Convolution(affine, weight, None, 1, Space(1, (size,)))
        assert triton_kernels._has_product(x, conv) == there


@pytest.mark.parametrize("inputs", [64, 96, 128, 160])
def test_launches_are_smaller_where_a_program_has_less_memory(
    monkeypatch: pytest.MonkeyPatch, inputs: int
) -> None:
    """116,736 bytes do not fit into the 99 KB that a program has on sm_86 and sm_89."""
    x = torch.empty(70_000, inputs, dtype=torch.bfloat16)
    large = triton_pointwise._backward_launch(x, 128, True)
    monkeypatch.setattr(triton_pointwise, "shared_memory", lambda _device: 101_376)
    small = triton_pointwise._backward_launch(x, 128, True)
    assert small.channels == 64
    assert (large == small) == (inputs not in (96, 128))


def test_backward_gives_the_same_bits_each_time() -> None:
    x, space = given(70, 20, F16, 4), Space(2, (7, 5))
    weight = torch.randn(12, 20, 3, 3).half()
    grad = torch.randn(70, 12).half()

    def run() -> list[Tensor]:
        total = torch.empty(70, 20)
        found = triton_spatial.backward(
            grad, x.x, x.affine, weight, 1, space, True, total, x.x, True
        )
        return [total, *(tensor for tensor in found if tensor is not None)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_rows_may_lie_beyond_two_to_the_31() -> None:
    """In a process of its own, which offsets of 32 bits end with a fault."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "far_rows.py"], capture_output=True, text=True
    )
    if done.stderr.startswith("no room"):
        pytest.skip("the system lends no 24 GB of addresses")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
