"""A block's inference by the Triton kernels: norms at once, the second one within a product.

On a GPU, or in Triton's interpreter where there is none.
"""

from collections import Counter
from typing import Any

import block_cases as blocks
import pytest
import torch
from block_cases import EVAL, NormCase, StepCase
from test_triton_kernels import DEVICE, few_programs, triton_kernels, triton_spatial, triton_tiles
from torch import Tensor

from densely.fused import backend, kernels, plain
from densely.fused.kernels import triton_vectors
from densely.fused.kernels.operands import NormVectors
from densely.fused.kernels.reference import Kernels

__all__ = ["few_programs"]  # a fixture of every test here too
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

OTHER_EPS = NormCase("eval", eps=1e-2)
BARE = NormCase("eval", weight=False, bias=False)
CASES = {
    "bottleneck": blocks.block((2, 3, 5, 4), norm=EVAL, count=3),
    "biases": blocks.block((2, 5, 4, 3), growth=3, width=7, norm=EVAL, bias=True, count=2),
    "plain": blocks.block((2, 3, 5, 4), width=None, norm=EVAL, count=2),
    "wide": blocks.block((1, 70, 9, 8), growth=12, width=48, norm=EVAL, count=2),
    "of 130 between": blocks.block((1, 9, 2, 3), growth=5, width=130, norm=EVAL, count=1),
    "1D": blocks.block((2, 3, 19), norm=EVAL),
    "3D": blocks.block((2, 3, 3, 2, 4), norm=EVAL),
    "two of 1x1, and 3x3 twice": blocks.Case(
        (2, 4, 5, 4),
        (
            (StepCase(6, 1, EVAL), StepCase(3, 1, EVAL, bias=True)),
            (StepCase(6, 3, EVAL), StepCase(3, 3, EVAL, dilation=2)),
            (StepCase(5, 1, EVAL), StepCase(3, 3, EVAL, dilation=2)),
        ),
    ),
    "two eps": blocks.Case(
        (2, 4, 5, 4), ((StepCase(6, 1, EVAL), StepCase(3, 3, OTHER_EPS)), (StepCase(2, 3, EVAL),))
    ),
    "norms that learn nothing": blocks.Case(
        (2, 4, 5, 4), ((StepCase(6, 1, BARE), StepCase(3, 3, EVAL)),)
    ),
}


def frozen(case: blocks.Case, dtype: torch.dtype) -> blocks.Inputs:
    return blocks.Inputs(*blocks.build(case._replace(learnt=0.0, x_learnt=False), dtype))


def output(call: Any, tree: blocks.Inputs, name: str) -> Tensor:
    with kernels.use(name), torch.no_grad():
        found = call(*blocks.change(tree, lambda t: t.to(DEVICE)))
    assert isinstance(found, Tensor)
    return found.cpu()


def exact(tree: blocks.Inputs) -> Tensor:
    doubles = blocks.change(tree, lambda t: t.double() if t.is_floating_point() else t)
    return output(plain.dense_block, doubles, "reference")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inference_equals_float64(case: blocks.Case) -> None:
    tree = frozen(case, torch.float32)
    before = backend.fused_calls["dense block"]
    found = output(backend.dense_block, tree, "triton")
    assert backend.fused_calls["dense block"] == before + 1, "did not run fused"
    torch.testing.assert_close(found.double(), exact(tree), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bottleneck", "wide", "3D"])
def test_inference_in_float16_is_no_further_from_float64_than_plain(name: str) -> None:
    tree = frozen(CASES[name], torch.float16)
    expected = exact(tree)
    theirs, ours = (
        float((output(call, tree, kind).double() - expected).norm())
        for call, kind in ((plain.dense_block, "reference"), (backend.dense_block, "triton"))
    )
    assert ours <= 1.1 * theirs


def test_in_float16_what_lies_between_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written normalised, and read as it is."""
    read: list[tuple[Tensor, Any]] = []
    forward = triton_spatial.forward

    def watched(x: Tensor, affine: Any, *rest: Any) -> Any:
        read.append((x.clone(), affine))
        return forward(x, affine, *rest)

    monkeypatch.setattr(triton_spatial, "forward", watched)
    case = blocks.block((2, 8, 5, 4), width=7, norm=EVAL, bias=True, count=1)
    tree = frozen(case, torch.float16)
    output(backend.dense_block, tree, "triton")
    ((between, affine),) = read
    assert affine is None
    (first, second), *_ = tree.layers
    x = tree.x.double().permute(0, 2, 3, 1).flatten(0, 2)
    for norm in (first.norm, second.norm):
        assert norm.weight is not None
        assert norm.bias is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        x = ((x - norm.running_mean) * scale + norm.bias).relu()
        if norm is first.norm:
            assert first.conv.bias is not None
            read_first = x.half().double()  # a prologue gives the product what 16 bits hold
            x = read_first @ first.conv.weight.flatten(1).double().t() + first.conv.bias
    off = (between.cpu().double() - x).abs()
    assert (off <= 2**-11 * x.abs() + 1e-5).float().mean() > 0.95
    assert (off <= 2**-10 * x.abs() + 1e-4).all()


def launches(case: blocks.Case, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counted: Counter[str] = Counter()
    launch = triton_tiles.launch

    def counting(kernel: Any, *rest: Any, **options: Any) -> None:
        counted[kernel.fn.__name__] += 1
        launch(kernel, *rest, **options)

    with kernels.use("triton"):  # which tries a launch on a GPU that it meets first
        pass
    for module in (triton_vectors, triton_spatial, triton_kernels.triton_pointwise):
        monkeypatch.setattr(module, "launch", counting)
    output(backend.dense_block, frozen(case, torch.float32), "triton")
    return counted


def test_inference_launches_two_convolutions_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one for all norms, or one for each where their eps differ."""
    assert launches(CASES["bottleneck"], monkeypatch) == {"_affine": 1, "_forward_kernel": 6}
    assert launches(CASES["two eps"], monkeypatch) == {"_affine": 3, "_forward_kernel": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_at_once_are_those_of_each(dtype: torch.dtype) -> None:
    """To the bit; vectors of 16 bits, as in `model.half()`, are read as they are."""
    torch.manual_seed(0)
    norms = [
        NormVectors(*torch.randn(3, n, device=DEVICE).to(dtype),
                    torch.rand(n, device=DEVICE).to(dtype), 1e-3, False)
        for n in (3, 8, 1, 300, 5)
    ]  # fmt: skip
    together = triton_kernels.TritonKernels().affines(norms)
    for found, norm in zip(together, norms, strict=True):
        alone = triton_kernels.TritonKernels().affine(norm)
        for one, other in zip(found[:4], alone[:4], strict=True):
            assert torch.equal(one, other)
            assert one.dtype == torch.float32
            assert one.data_ptr() % 16 == 0
        assert not found.training
        for one, other in zip(found[:4], Kernels().affine(norm)[:4], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
