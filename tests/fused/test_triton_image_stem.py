"""The stem that begins with the images through the Triton kernels, on a GPU or interpreted."""

from typing import Any

import numpy as np
import pytest
import torch
from block_cases import EVAL, NormCase, assert_same, is_no_worse
from block_oracle import Result, arrays
from image_stem_cases import CASES, Case, Inputs, build, call, gradient, oracle
from test_triton_kernels import DEVICE, few_programs, run
from torch import Tensor

from densely.fused import backend, image_stem, plain
from densely.fused.kernels import triton_image_stem
from densely.fused.kernels.operands import Affine, FirstConvolution, Pooling, Space

__all__ = ["few_programs"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("few_programs"),
]


def by(module: Any, case: Case, tree: Inputs, grad: Tensor, name: str = "triton") -> Result:
    """The stem of a module, with the kernels of this name."""
    return run(lambda x, layers: call(module, case, Inputs(x, layers)), tree, grad, name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_oracle(case: Case) -> None:
    tree, grad = build(case, torch.float32), gradient(case, torch.float32)
    expected = oracle(case, tree, grad)
    assert expected.margin > 1e-7, "an input of relu may fall on either side"
    assert_same(by(image_stem, case, tree, grad), expected, 1e-4)


@pytest.mark.parametrize("norm", [NormCase(), EVAL])
def test_programs_take_several_turns(monkeypatch: pytest.MonkeyPatch, norm: NormCase) -> None:
    """Those that go over images several tiles, and those that add up the parts several times 4."""
    launches: list[tuple[int, int]] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if "PARTS" not in options:
            launches.append((grid[0], options["BM"]))
        original(kernel, grid, *args, **options)

    original, adding = triton_image_stem.launch, triton_image_stem._adding
    monkeypatch.setattr(triton_image_stem, "launch", record)
    monkeypatch.setattr(triton_image_stem, "_adding", lambda taps: adding(taps) | {"PARTS": 4})
    case = Case((2, 1, 48, 48), norm=norm)
    tree, grad = build(case, torch.float32), gradient(case, torch.float32)
    assert_same(by(image_stem, case, tree, grad), oracle(case, tree, grad), 1e-4)
    parts, tile = launches[-1]  # of backward, which goes over the fewest rows
    assert 4 < parts < 2 * 12 * 12 // tile


@pytest.mark.parametrize("name", ["grey", "colour", "eval"])
def test_in_float16_is_no_further_from_float64_than_plain(name: str) -> None:
    case = CASES[name]
    tree, grad = build(case, torch.float16), gradient(case, torch.float16)
    theirs = by(plain, case, tree, grad, "reference")
    before = backend.fused_calls["image stem"]
    got = by(backend, case, tree, grad)
    assert backend.fused_calls["image stem"] == before + 1, "did not run fused"
    assert is_no_worse(got, theirs, oracle(case, tree, grad), torch.float16) == []


def test_float64_is_left_to_the_reference() -> None:
    case = CASES["bias"]
    tree, grad = build(case), gradient(case)
    assert_same(by(image_stem, case, tree, grad), oracle(case, tree, grad))


def test_two_runs_give_the_same_bits() -> None:
    case = CASES["colour"]
    tree, grad = build(case, torch.float16), gradient(case, torch.float16)
    first, second = (by(image_stem, case, tree, grad).all() for _ in range(2))
    for key, value in first.items():
        assert np.array_equal(value, second[key]), key


def test_of_equal_maxima_the_first_counts_and_nothing_below_zero_does() -> None:
    """Images of one value: all windows inside give the same, and what is masked adds nothing."""
    case = Case((1, 1, 16, 16), 4, (3, 3), (1, 1), (0, 0), (2, 2), EVAL)
    tree = build(case, torch.float32)
    tree.x.fill_(0.5)
    grad = gradient(case, torch.float32)
    assert_same(by(image_stem, case, tree, grad), oracle(case, tree, grad), 1e-5)


def test_a_channel_that_is_zero_has_no_gradient() -> None:
    case = Case(norm=EVAL)
    tree, grad = build(case, torch.float32), gradient(case, torch.float32)
    norm = tree.layers.norm
    assert norm.weight is not None
    assert norm.bias is not None
    with torch.no_grad():
        norm.weight[2], norm.bias[2] = 0, 0
    assert_same(by(image_stem, case, tree, grad), oracle(case, tree, grad), 1e-4)


def test_windows_know_where_their_nan_was() -> None:
    """At the corner of each of four windows of 3 x 3 that lies in the middle."""
    images = torch.ones(9, 1, device=DEVICE)
    images[4] = torch.nan
    ones = torch.ones(4, 1, device=DEVICE)
    conv = FirstConvolution(ones[0].view(1, 1, 1, 1), (1, 1), Space(1, (3, 3)))
    out, choice = torch.empty_like(ones), torch.empty_like(ones, dtype=torch.uint8)
    how = Pooling("max", (2, 2))
    triton_image_stem.pool(images, conv, Affine(*ones, False), how, out, choice)
    assert out.isnan().all()
    assert choice.flatten().tolist() == [8, 6, 2, 0]


def test_nan_spreads_as_far_as_in_plain() -> None:
    case = Case((2, 1, 16, 16), norm=EVAL)
    tree = build(case, torch.float32)
    tree.x[1, 0, 7, 8] = torch.nan
    with torch.no_grad():
        expected = call(plain, case, tree)
    got = by(image_stem, case, tree, gradient(case, torch.float32))
    assert np.array_equal(np.isnan(got.output), np.isnan(arrays(expected)))
    assert np.isnan(got.output).any()
    for key, value in by(plain, case, tree, gradient(case, torch.float32)).grads.items():
        assert np.array_equal(np.isnan(got.grads[key]), np.isnan(value)), key
