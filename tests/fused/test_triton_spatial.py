"""The Triton kernels of convolutions over a window against float64 products."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from product_cases import (
    F16,
    F32,
    ULP,
    added,
    check_backward,
    check_moments,
    given,
    neighbours_are_untouched,
    precisions,
    small_chip,
    totals,
    within,
)
from torch import Tensor

from densely.fused.kernels import triton_kernels, triton_launches, triton_spatial
from densely.fused.kernels.operands import Affine, Convolution, Space

__all__ = ["precisions", "small_chip"]  # fixtures

SPATIAL = [
    # batch, H and W, C, O, window, dilation, dtype, columns beyond C, bias, mode, trained
    (2, (9, 7), 20, 12, (3, 3), 1, F16, 4, False, "add", True),
    (1, (8, 8), 24, 7, (3, 3), 2, F16, 0, True, "store", True),
    (1, (5, 9), 7, 12, (3, 3), 1, F32, 5, True, "base", True),
    (1, (6, 5), 70, 40, (3, 3), 1, F16, 2, False, "base", False),
    (2, (40,), 9, 5, (3,), 20, F16, 1, False, "add", True),
    (1, (6, 20), 9, 5, (5, 3), 1, F16, 0, False, "store", True),
    (1, (6, 20), 9, 5, (5, 3), 1, F16, 7, False, "store", True),
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


def test_spatial_where_float32_may_be_rounded_to_tf32(precisions: Any) -> None:
    """By other launches; the interpreter's products are exact all the same."""
    for setting in precisions:
        setting.fp32_precision = "tf32"
    test_spatial(*SPATIAL[2])


class TriesAll:
    """A tuner that keeps what each launch of the input's gradient makes."""

    def __init__(self) -> None:
        self.made: list[list[Tensor]] = []

    def choose(self, choice: Any) -> Any:
        if choice.step.kind == "spatial input":
            for launch in (choice.usual, *choice.others):
                self.made.append([made.clone() for made in choice.made(choice.run(launch))])
        return choice.usual


@pytest.mark.parametrize(("window", "outputs"), [((5, 3), 5), ((3, 3), 70), ((1, 5), 40)])
def test_what_may_be_tried_for_windows_whose_weights_do_not_all_stay_in_memory_is_right(
    window: tuple[int, int], outputs: int
) -> None:
    x, space = given(12, 9, F16, 7), Space(1, (4, 3))
    weight, grad = torch.randn(outputs, 9, *window).half(), torch.randn(12, outputs).half()
    total, tuner = torch.empty(12, 9), TriesAll()
    with triton_launches.tuning(tuner):
        triton_spatial.backward(grad, x.x, x.affine, weight, 1, space, False, total, None, False)
    usual, *others = tuner.made
    assert others
    for made in others:
        torch.testing.assert_close(made, usual, rtol=1e-4, atol=1e-4)


def test_a_bias_may_lie_strided() -> None:
    x, space, bias = given(20, 6, F32, 2), Space(1, (4, 5)), torch.randn(6)[::2]
    weight, out, expected = torch.randn(3, 6, 3, 3), within(20, 3, F32), within(20, 3, F32)
    triton_spatial.forward(x.x, x.affine, weight, bias, 1, space, out, False)
    triton_spatial.forward(x.x, x.affine, weight, bias.contiguous(), 1, space, expected, False)
    assert torch.equal(out, expected)


def test_without_moments_there_are_none() -> None:
    x, space = given(20, 6, F32, 2), Space(1, (4, 5))
    weight, out = torch.randn(3, 6, 3, 3), within(20, 3, F32)
    assert triton_spatial.forward(x.x, x.affine, weight, None, 1, space, out, False) is None


def test_an_empty_batch_has_sums_of_zero() -> None:
    x, space = given(0, 8, F32, 0), Space(0, (4, 5))
    weight, out, total = torch.randn(3, 8, 3, 3), torch.empty(0, 3), torch.empty(0, 8)
    triton_spatial.forward(x.x, x.affine, weight, None, 1, space, out, False)
    found = triton_spatial.backward(out, x.x, x.affine, weight, 1, space, True, total, None, False)
    assert all(tensor is not None and not tensor.any() for tensor in found)


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
