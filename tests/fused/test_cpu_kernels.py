"""The compiled CPU kernels, row lengths and dtypes one by one, against float64."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from densely.fused import kernels
from densely.fused.kernels import reference
from densely.fused.kernels.operands import Affine, Convolution, Pending, Pooling, Space
from densely.fused.kernels.reference import Kernels

if "cpu" not in kernels.available():
    pytest.skip("no compiler, or no library for this CPU", allow_module_level=True)
with kernels.use("cpu"):
    CPU = kernels.chosen(torch.empty(0))
ROWS = 133  # two groups of 64, and some
COLUMNS = [*range(1, 41), 63, 64, 65, 100, 129]  # tails of all lengths; narrow and wide
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gaps = pytest.mark.parametrize("gap", [0, 5], ids=["contiguous", "strided"])


class Maker:
    """Random matrices of one dtype, which are the first columns of wider ones."""

    def __init__(self, dtype: torch.dtype, gap: int, rows: int = ROWS) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.dtype, self.gap, self.rows = dtype, gap, rows

    def matrix(self, columns: int) -> Tensor:
        values = torch.randn(self.rows, columns + self.gap, generator=self.random)
        return values.to(self.dtype)[:, :columns]

    def vector(self, columns: int) -> Tensor:
        return torch.randn(columns, generator=self.random)

    def affine(self, columns: int) -> Affine:
        scale, shift, mean = (self.vector(columns) for _ in range(3))
        return Affine(scale, shift, mean, self.vector(columns).abs() + 0.5, True)

    def poisoned(self, columns: int) -> Tensor:
        whole = torch.full((self.rows, columns + self.gap), 77.0, dtype=self.dtype)
        return whole[:, :columns]


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """NaN and infinity where they belong; else up to a few roundings of the largest value."""
    finite = expected[expected.isfinite()].abs()
    largest = max(1.0, finite.max().item()) if finite.numel() else 1.0
    near = 20 * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=near, equal_nan=True)


def assert_moments(got: tuple[Tensor, Tensor], matrix: Tensor) -> None:
    var, mean = torch.var_mean(matrix.double(), dim=0, correction=0)
    assert_near(got[0], mean, torch.float32)
    assert_near(got[1], var, torch.float32)


def assert_untouched(matrix: Tensor) -> None:
    base = matrix if matrix._base is None else matrix._base
    assert (base[:, matrix.shape[1] :] == 77).all()


def doubled(affine: Affine) -> Affine:
    return Affine(*(v.double() for v in affine[:4]), True)


def activated(x: Tensor, affine: Affine) -> Tensor:
    """relu(x * scale + shift) in float64, rounded as maps are."""
    y = x.double() * affine.scale.double() + affine.shift.double()
    return y.clamp_min(0).to(x.dtype).double()  # NaN stays


def spoil(x: Tensor) -> None:
    """What is not finite, in the first and the last column."""
    x[0, 0], x[1, -1], x[65, 0], x[66, -1] = math.nan, math.nan, math.inf, -math.inf


@every_dtype
@gaps
@pytest.mark.parametrize("columns", COLUMNS)
def test_element_wise(dtype: torch.dtype, gap: int, columns: int) -> None:
    make = Maker(dtype, gap)
    x, affine = make.matrix(columns), make.affine(columns)
    spoil(x)
    act = CPU.norm_relu(x, affine)
    assert_near(act, activated(x, affine), dtype)
    g, total, out = make.matrix(columns), make.matrix(columns), make.poisoned(columns)
    terms = [make.vector(columns) for _ in range(2)]
    centred = (x.double() - affine.mean) * terms[1]
    for from_, scale in ((g, affine.scale), (total, None), (g.float(), affine.scale)):
        scaled = from_.double() * (1 if scale is None else scale)
        CPU.form(Pending(from_, x, scale, affine.mean, *terms), out)
        assert_near(out, scaled - terms[0] - centred, dtype)
        CPU.form(Pending(from_, x, scale, None, None, None), out)
        assert_near(out, scaled, dtype)
        assert_untouched(out)


@every_dtype
@gaps
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("into", ["masked", "add", "store"])
def test_norm_relu_backward(dtype: torch.dtype, gap: int, columns: int, into: str) -> None:
    make = Maker(dtype, gap)
    x, affine, g = make.matrix(columns), make.affine(columns), make.matrix(columns)
    act = CPU.norm_relu(x, affine)
    act[0, 0], act[1, -1], g[2, 0], g[3, -1] = math.nan, math.nan, math.nan, math.inf
    act[2, 0], act[3, -1] = 0, 1
    base, out = make.matrix(columns), make.poisoned(columns)
    before = out.double().clone()
    weight, bias = torch.empty(columns), torch.empty(columns)
    torch.ops.densely_cpu.norm_relu_backward(
        g, act, x, affine.scale, affine.mean, affine.rstd, base if into == "store" else None, out,
        into != "masked", weight, bias,
    )  # fmt: skip
    masked = torch.where(act <= 0, 0.0, g.double())
    scaled = masked * affine.scale
    expected = {"masked": masked, "add": before + scaled, "store": base.double() + scaled}
    assert_near(out, expected[into], dtype)
    assert_untouched(out)
    xhat = (x.double() - affine.mean) * affine.rstd
    assert_near(bias, masked.sum(0), torch.float32)
    assert_near(weight, (masked * xhat).sum(0), torch.float32)


@pytest.mark.parametrize("rows", [64, 250, 1000])
@pytest.mark.parametrize("far", [1e2, 1e3, 1e4])
def test_moments_of_values_far_from_zero(rows: int, far: float) -> None:
    """The mean of a few rows is rounded to float32: what that moves is not to show."""
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0)) + far
    mean, var = torch.empty(40), torch.empty(40)
    CPU.moments(x, (mean, var))
    exact_var, exact_mean = torch.var_mean(x.double(), dim=0, correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-6, atol=0)


@every_dtype
@gaps
@pytest.mark.parametrize("columns", COLUMNS)
def test_place(dtype: torch.dtype, gap: int, columns: int) -> None:
    make = Maker(dtype, gap)
    x, out = make.matrix(columns), make.poisoned(columns)
    x[:, 0] += 8
    mean, var = torch.empty(columns), torch.empty(columns)
    CPU.place(x, out, (mean, var))
    assert_moments((mean, var), x)
    x[0, 0], x[70, -1] = math.nan, math.inf
    CPU.place(x, out, (mean, var))
    torch.testing.assert_close(out, x, rtol=0, atol=0, equal_nan=True)
    assert_untouched(out)
    assert not mean[[0, -1]].isfinite().any()
    assert mean[1:-1].isfinite().all()


@every_dtype
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", ["max", "average"])
def test_pooling(dtype: torch.dtype, columns: int, kind: str) -> None:
    space, pooling = Space(2, (9, 7)), Pooling(kind, (2, 2))  # type: ignore[arg-type]
    make = Maker(dtype, 3, space.rows)
    x = (make.matrix(columns) * 4).round() / 4  # all is exact, so that maxima tie for everybody
    signs, halves = make.vector(columns).sign(), (make.vector(columns) * 2).round() / 2
    affine = Affine(signs, halves, halves, signs.abs() + 0.5, True)
    got, choice = CPU.pool(x, affine, pooling, space)
    expected, _ = Kernels().pool(x, affine, pooling, space)
    assert_near(got, expected, dtype)
    grad = Maker(dtype, 0, got.shape[0]).matrix(columns)
    got_x, got_norm = CPU.pool_backward(grad, choice, x, affine, pooling, space)
    expected_x, norm = Kernels().pool_backward(
        grad.double(), choice, x.double(), doubled(affine), pooling, space
    )
    assert_near(got_x, expected_x, dtype)
    for one, other in zip(got_norm, norm, strict=True):
        assert_near(one, other, torch.float32)
    x[0, 0], x[20, -1] = math.nan, math.inf
    got, _ = CPU.pool(x, affine, pooling, space)
    assert_near(got, Kernels().pool(x, affine, pooling, space)[0], dtype)


@pytest.mark.parametrize("side", [4, 5, 8, 64])
def test_an_average_of_many_places_does_not_drift(side: int) -> None:
    space, pooling = Space(3, (side, side)), Pooling("average", (side, side))
    make = Maker(torch.float32, 0, space.rows)
    x, affine = make.matrix(40), make.affine(40)
    act = CPU.norm_relu(x, affine)
    got, _ = CPU.pool(x, affine, pooling, space)
    plain = torch.nn.functional.adaptive_avg_pool2d(space.maps(act), 1).flatten(1)
    exact = space.maps(act.double()).mean((2, 3))
    far, before = ((some - exact).norm() for some in (got, plain))
    assert far <= 1.5 * before + 1e-8 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@gaps
@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(133, 1, 1), (133, 37, 12), (20000, 70, 20)]
)
def test_pointwise(dtype: torch.dtype, gap: int, rows: int, columns: int, width: int) -> None:
    """Several tiles a thread in the last case."""
    make = Maker(dtype, gap, rows)
    x, affine = make.matrix(columns), make.affine(columns)
    weight = torch.randn(width, columns, 1, 1, generator=make.random).to(dtype)
    conv = Convolution(affine, weight, None, 1, Space(1, (rows, 1)))
    out, moments = make.poisoned(width), (torch.empty(width), torch.empty(width))
    CPU.convolve(x, conv, out, moments)
    act, flat = activated(x, affine), weight.flatten(1).double()
    assert_near(out, act @ flat.T, dtype)
    assert_untouched(out)
    assert_moments(moments, out)

    grad, base, total = make.matrix(width), make.matrix(columns), make.poisoned(columns)
    terms = tuple(torch.zeros(columns) for _ in range(2))
    grad_weight, norm = CPU.convolve_backward_add(
        grad, x, conv, True, total, base, (terms[0], terms[1])
    )
    back = torch.where(act <= 0, 0.0, (grad.double() @ flat).to(dtype).double())
    assert_near(total, base.double() + back * affine.scale, dtype)
    assert_untouched(total)
    assert grad_weight is not None
    assert_near(grad_weight.flatten(1), grad.double().T @ act, dtype)
    assert_near(norm.bias, back.sum(0), dtype)


@pytest.fixture(params=[2, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Chunks of rows are as many as threads, and what they found is put together."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _exact(conv: Convolution) -> Convolution:
    return conv._replace(affine=doubled(conv.affine), weight=conv.weight.double())


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(70, 50), (9, 20, 20)], ids=["2d", "3d"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_in_threads(dtype: torch.dtype, size: tuple[int, ...], kernel: int) -> None:
    """Chunks end within images, where lines of a neighbour are read."""
    space = Space(7, size)
    make = Maker(dtype, 5, space.rows)
    x, affine = make.matrix(24), make.affine(24)
    weight = torch.randn(12, 24, *(kernel,) * len(size), generator=make.random).to(dtype) / 15
    conv = Convolution(affine, weight, None, 1, space)
    out, moments = make.poisoned(12), (torch.empty(12), torch.empty(12))
    CPU.convolve(x, conv, out, moments)
    act, exact = activated(x, affine), _exact(conv)
    assert_near(out, reference.convolve(act, exact), dtype)
    assert_moments(moments, out)

    grad, total = make.matrix(12), make.poisoned(24)
    zeros = torch.zeros(24), torch.zeros(24)
    made_weight, norm = CPU.convolve_backward_add(grad, x, conv, True, total, None, zeros)
    expected = torch.full_like(total, 77.0).double()
    doubles = tuple(v.double() for v in zeros)
    made = Kernels().convolve_backward_add(
        grad.double(), x.double(), exact, True, expected, None, (doubles[0], doubles[1])
    )
    assert made_weight is not None
    assert made[0] is not None
    # Where x is next to a ReLU's zero, rounding decides: what it lets through is small in sums.
    for one, other in ((made_weight, made[0]), (norm.weight, made[1].weight)):
        far = (one.double() - other).norm() / other.norm()
        assert far < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_pointwise_with_a_bias(dtype: torch.dtype, step: int) -> None:
    """The bias need not be contiguous."""
    make = Maker(dtype, 5, 2000)
    x, affine, out = make.matrix(37), make.affine(37), make.poisoned(12)
    weight = torch.randn(12, 37, 1, 1, generator=make.random).to(dtype) / 6
    bias = (make.vector(12 * step) * 8).to(dtype)[::step]
    CPU.convolve(x, Convolution(affine, weight, bias, 1, Space(1, (2000, 1))), out, None)
    assert_near(out, activated(x, affine) @ weight.flatten(1).double().T + bias.double(), dtype)


@pytest.mark.parametrize("columns", [16, 24, 33])
def test_gradients_of_dilated_convolutions_in_bfloat16(columns: int) -> None:
    """oneDNN's were garbage in channels-last, or a crash."""
    space = Space(2, (40, 40))
    make = Maker(torch.bfloat16, 0, space.rows)
    x, affine, grad = make.matrix(columns), make.affine(columns), make.matrix(12)
    weight = torch.randn(12, columns, 3, 3, generator=make.random).bfloat16() / 15
    weight = weight.contiguous(memory_format=torch.channels_last)
    conv = Convolution(affine, weight, None, 2, space)
    found = reference.convolve_backward(grad, x, conv, True)
    exact = reference.convolve_backward(grad.double(), x.double(), _exact(conv), True)
    for one, other in zip(found, exact, strict=True):
        assert one is not None
        assert other is not None
        assert (one.double() - other).norm() < 0.01 * other.norm()


@pytest.mark.usefixtures("_threads")
@every_dtype
def test_sums_over_rows_in_threads(dtype: torch.dtype) -> None:
    space = Space(7, (70, 50))
    make = Maker(dtype, 5, space.rows)
    x, affine, out = make.matrix(24), make.affine(24), make.poisoned(24)
    x[: len(x) // 2] += 3  # so that chunks have means of their own
    mean, var = torch.empty(24), torch.empty(24)
    CPU.place(x, out, (mean, var))
    assert_moments((mean, var), x)

    g, act = make.matrix(24), CPU.norm_relu(x, affine)
    norm, _ = CPU.norm_relu_backward(g.clone(), act, x, affine)
    masked = torch.where(act <= 0, 0.0, g.double())
    xhat = (x.double() - affine.mean) * affine.rstd
    assert_near(norm.bias, masked.sum(0), torch.float32)
    assert_near(norm.weight, (masked * xhat).sum(0), torch.float32)

    pooling = Pooling("average", (2, 2))
    _, choice = CPU.pool(x, affine, pooling, space)
    grad = Maker(dtype, 0, 7 * 35 * 25).matrix(24)
    _, pooled = CPU.pool_backward(grad, choice, x, affine, pooling, space)
    spread = grad.double().view(7, 35, 25, 24).repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
    masked = torch.where(activated(x, affine) <= 0, 0.0, spread.view(-1, 24))
    far = (pooled.bias.double() - masked.sum(0)).norm() / masked.sum(0).norm()
    assert far < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("columns", [64, 256, 13])
def test_every_number_of_16_bits_is_kept(dtype: torch.dtype, columns: int) -> None:
    """Denormals among them, and halves of the last place are rounded as PyTorch does."""
    bits = torch.arange(1 << 16).to(torch.int16)
    x = bits[: len(bits) // columns * columns].view(dtype).view(-1, columns)
    ones, zeros = torch.ones(columns), torch.zeros(columns)
    same = CPU.norm_relu(x, Affine(ones, zeros, zeros, ones, False))
    torch.testing.assert_close(same, x.clamp_min(0), rtol=0, atol=0, equal_nan=True)
    wide = x.float() * 1.00390625  # half of bfloat16's last place and more
    made = CPU.form(Pending(wide, x, None, None, None, None))
    torch.testing.assert_close(made, wide.to(dtype), rtol=0, atol=0, equal_nan=True)
