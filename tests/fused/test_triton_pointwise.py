"""The Triton kernels of 1x1 convolutions against float64 products."""

from typing import Any

import pytest
import torch
from product_cases import (
    F16,
    F32,
    ULP,
    VECTORS,
    added,
    arriving,
    check_backward,
    check_moments,
    formed,
    given,
    neighbours_are_untouched,
    precisions,
    small_chip,
    totals,
    within,
)

from densely.fused.kernels import triton_pointwise

__all__ = ["precisions", "small_chip"]  # fixtures

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


def test_pointwise_where_float32_may_be_rounded_to_tf32(precisions: Any) -> None:
    """By other launches; the interpreter's products are exact all the same."""
    for setting in precisions:
        setting.fp32_precision = "tf32"
    test_pointwise(*POINTWISE[0])


def test_weights_and_biases_may_lie_strided() -> None:
    x, weight, bias = given(20, 6, F32, 2), torch.randn(3, 12)[:, ::2], torch.randn(6)[::2]
    grad, made = torch.randn(20, 3), []
    for w, b in ((weight, bias), (weight.contiguous(), bias.contiguous())):
        out, total = within(20, 3, F32), torch.empty(20, 6)
        triton_pointwise.forward(x.x, x.affine, w, b, out, False)
        triton_pointwise.backward(grad, x.x, x.affine, w, False, total, None, False)
        made.append((out, total))
    for strided, expected in zip(*made, strict=True):
        assert torch.equal(strided, expected)


def test_without_moments_there_are_none() -> None:
    x = given(20, 6, F32, 2)
    weight, out = torch.randn(3, 6), within(20, 3, F32)
    assert triton_pointwise.forward(x.x, x.affine, weight, None, out, False) is None


def test_an_empty_batch_has_sums_of_zero() -> None:
    x, weight = given(0, 8, F32, 0), torch.randn(3, 8)
    out, total = torch.empty(0, 3), torch.empty(0, 8)
    triton_pointwise.forward(x.x, x.affine, weight, None, out, False)
    found = triton_pointwise.backward(out, x.x, x.affine, weight, True, total, None, False)
    assert all(tensor is not None and not tensor.any() for tensor in found)


def test_a_nan_reaches_the_output_and_no_other_row() -> None:
    x = given(20, 6, F32, 2)
    x.x[7, 2] = torch.nan
    weight, out = torch.randn(3, 6), within(20, 3, F32)
    triton_pointwise.forward(x.x, x.affine, weight, None, out, False)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [7]


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
