"""The fused dense block against its definition in float64 NumPy, and against plain PyTorch."""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import block_oracle
import numpy as np
import pytest
import torch
from block_cases import (
    EVAL,
    LARGE,
    MIXED,
    MODES,
    NUMBERS,
    ON_CPU,
    SHAPED,
    TRAIN,
    Case,
    Inputs,
    NormCase,
    StepCase,
    Tree,
    assert_same,
    block,
    build,
    cast,
    draw_masks,
    every_kernel,
    every_kind,
    every_shape,
    finite_differences,
    fused,
    gradient,
    is_no_worse,
    norm_cases,
    oracle,
    outcome,
    run,
    with_norms,
)
from block_oracle import Result, arrays, change, fresh, named
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densely.fused import backend, kernels, plain
from densely.fused.plain import Layer

# The oracle itself.


def test_finite_differences_agree_with_the_oracle() -> None:
    x, layers = build(MIXED)
    masks = draw_masks(x, layers, 0)

    def step(x: np.ndarray, layers: Tree, grad: np.ndarray) -> Result:
        return block_oracle.dense_block(x, layers, masks, grad)

    assert len(step(*arrays((x, layers, gradient(MIXED)))).grads) == 1 + 3 * 4 + 2 * 4 - 1
    assert finite_differences(*arrays((x, layers, gradient(MIXED))), step) == []


def test_plain_agrees_with_the_oracle() -> None:
    x, layers = build(MIXED)
    got = run(plain, x, layers, gradient(MIXED), seed=0)
    assert_same(got, oracle(x, layers, gradient(MIXED)))
    assert len(got.grads) == len(named((x, layers))) - len(got.statistics)


# Any block.


SPACES = [
    *((1,), (2,), (9,), (37,)),
    *((1, 1), (2, 2), (3, 5), (7, 2), (9, 11), (16, 16)),
    *((1, 1, 1), (2, 3, 2), (1, 4, 3)),
]


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    space = draw(st.sampled_from(SPACES))
    shape = (draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 16, 33])), *space)
    alone = shape[0] * math.prod(space) == 1
    # Each norm its own way; or all in one mode, as most networks are.
    modes = ("eval",) if alone else draw(st.sampled_from([MODES, ("train",), ("eval",), MODES[:2]]))
    drops = draw(st.sampled_from([[0.0], [0.0], [0.0, 0.2, 0.5], [0.3, 1.0]]))

    def step(out: int, size: int) -> StepCase:
        return StepCase(
            out,
            size,
            draw(norm_cases(modes)),
            draw(st.booleans()),
            draw(st.integers(1, 2)) if size > 1 else 1,
            draw(st.sampled_from(drops)),
            draw(st.booleans()),
        )

    layers = []
    for _ in range(draw(st.integers(1, 4))):
        new = step(draw(st.sampled_from([1, 3, 7, 12, 32])), 3)
        width = draw(st.sampled_from([None, 1, 4, 12, 48]))
        layers.append((new,) if width is None else (step(width, 1), new))
    learnt = draw(st.sampled_from([1.0, 0.5, 0.1, 0.0]))
    return Case(shape, tuple(layers), learnt, draw(st.booleans()), draw(st.integers(0, 999)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_any_block_equals_the_oracle(case: Case) -> None:
    x, layers = build(case)
    grad = gradient(case)
    expected = oracle(x, layers, grad, case.seed)
    with fused("reference"):
        assert_same(run(backend, x, layers, grad, case.seed), expected)


def test_the_kernels_chosen_take_float64() -> None:
    x, layers = build(MIXED)
    with fused():
        got = run(backend, x, layers, gradient(MIXED))
    assert_same(got, oracle(x, layers, gradient(MIXED)))


@every_kernel
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases())
def test_any_block_is_near_the_oracle_in_float32(name: str, case: Case) -> None:
    x, layers = build(case, torch.float32)
    grad = gradient(case, torch.float32)
    expected = oracle(x, layers, grad, case.seed)
    with fused(name):
        got = run(backend, x, layers, grad, case.seed)
    if expected.margin < 3e-5:  # an input of ReLU may fall on either side
        got, expected = got._replace(grads={}), expected._replace(grads={})
    assert_same(got, expected, 1e-3)


# Other numbers than float64.


@functools.cache
def large(shape: str, kind: str, offset: float) -> tuple[Tensor, Any, Tensor, Result, Result]:
    """Input, layers and gradient of a large block; what they give in plain PyTorch and exactly."""
    case = LARGE[shape]
    dtype, computed_in, place = cast(kind)
    x, layers = build(case, dtype)
    x = (x.detach() + offset).to(computed_in).requires_grad_()
    grad = gradient(case, computed_in)
    with place:
        plainly = run(plain, x, layers, grad)
    return x, layers, grad, plainly, oracle(x, layers, grad)


@pytest.mark.parametrize(
    ("shape", "kind", "name"),
    [
        *(("bottleneck", kind, "cpu") for kind in NUMBERS),
        *(("bottleneck", kind, "reference") for kind in NUMBERS),
        *(("plain", kind, "cpu") for kind in ("float32", "autocast")),
    ],
)
def test_no_further_from_float64_than_plain(shape: str, kind: str, name: str) -> None:
    if name not in kernels.available():
        pytest.skip(f"no {name} kernels here")
    x, layers, grad, plainly, expected = large(shape, kind, 0.0)
    _, computed_in, place = cast(kind)
    with place, fused(name):
        got = run(backend, x, layers, grad)
    assert is_no_worse(got, plainly, expected, computed_in) == []


@every_kernel
def test_no_further_from_float64_than_plain_far_from_zero(name: str) -> None:
    x, layers, grad, plainly, expected = large("bottleneck", "float32", 100.0)
    with fused(name):
        got = run(backend, x, layers, grad)
    # Many inputs of ReLU are nearer to zero than the rounding, so that gradients differ by chance.
    assert is_no_worse(got, plainly, expected, torch.float32, 5.0) == []


@every_kernel
@pytest.mark.parametrize("norm", [TRAIN, EVAL], ids=["train", "eval"])
def test_float32_under_autocast_equals_plain(name: str, norm: NormCase) -> None:
    x, layers = build(block(norm=norm), torch.float32)
    found = []
    for module in (plain, backend):
        with torch.autocast("cpu", torch.bfloat16), kernels.use(name):
            found.append(run(module, x, layers, gradient(block(), torch.float32)))
    assert_same(found[1], found[0], 2**-7)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
def test_output_is_of_the_dtype_of_plain(kind: str) -> None:
    dtype, _, place = cast(kind)
    with place:
        outs = [module.dense_block(*build(block(), dtype)) for module in (plain, backend)]
    assert outs[0].dtype == outs[1].dtype


# How it is called.


@every_kind
@every_shape
def test_a_batch_of_one(dtype: torch.dtype, name: str, near: float, case: Case) -> None:
    case = case._replace(shape=(1, 5, 7, 6))
    x, layers = build(case, dtype)
    with fused(name):
        got = run(backend, x, layers, gradient(case, dtype))
    assert_same(got, oracle(x, layers, gradient(case, dtype)), near)


@every_kind
@pytest.mark.parametrize("case", [*SHAPED.values(), block(norm=EVAL)], ids=[*SHAPED, "eval"])
@pytest.mark.parametrize("layout", ["channels last", "strided", "expanded", "offset"])
def test_any_layout(dtype: torch.dtype, name: str, near: float, case: Case, layout: str) -> None:
    x, layers = build(case, dtype)
    grad = gradient(case, dtype)

    def lay_out(t: Tensor) -> Tensor:
        if layout == "channels last":
            return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t
        if layout == "strided":
            return torch.stack([t, -t], -1)[..., 0]
        if layout == "offset":
            return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
        return t

    if layout == "expanded":
        x = x.detach()[:1, :, :, :1].expand(x.shape)
        grad = grad[:, :1].expand(grad.shape)
    expected = oracle(x, layers, grad)
    x, grad = lay_out(x.detach()), lay_out(grad)
    layers = change(fresh(layers), lambda t: lay_out(t.detach()).requires_grad_(t.requires_grad))
    x.requires_grad_(layout != "expanded")
    with fused(name):
        got = outcome(backend.dense_block(x, layers), Inputs(x, layers), grad)
    assert_same(got, expected, near)


@every_kind
@every_shape
@pytest.mark.parametrize("norm", [TRAIN, EVAL], ids=["train", "eval"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients(
    dtype: torch.dtype, name: str, near: float, case: Case, norm: NormCase, without: Any
) -> None:
    x, layers = build(with_norms(case, norm), dtype)
    expected = run(plain, x, layers, gradient(case, dtype))
    tree = fresh(Inputs(x, layers))
    with without(), fused(name):
        got = outcome(backend.dense_block(*tree).clone(), change(tree, Tensor.detach), x)
    assert_same(got, expected, near)
    with kernels.use(name):
        assert_same(got, run(backend, x, layers, gradient(case, dtype)), 1e-6)


@every_kind
@every_shape
def test_same_bits_for_two_runs(dtype: torch.dtype, name: str, near: float, case: Case) -> None:
    case = with_norms(case, TRAIN)._replace(shape=(3, 17, 9, 7))
    x, layers = build(case, dtype)
    with kernels.use(name):
        first, second = (run(backend, x, layers, gradient(case, dtype)) for _ in range(2))
    assert first.all().keys() == second.all().keys()
    for key, value in first.all().items():
        assert np.array_equal(value, second.all()[key]), key


@every_kind
@every_shape
def test_statistics_change_once_a_forward(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    x, layers = build(case, dtype)
    grad = gradient(case, dtype)
    expected = oracle(x, layers, grad)
    tree = fresh(Inputs(x, layers))
    learnt = [t for t in named(tree).values() if t.requires_grad]
    with fused(name):
        out = backend.dense_block(*tree)
        first = torch.autograd.grad(out, learnt, grad, retain_graph=True)
        second = torch.autograd.grad(out, learnt, grad, create_graph=True)
        torch.autograd.grad(second[0].sum(), learnt, allow_unused=True)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=near, atol=near * 10)
    assert_same(outcome(out.detach(), change(tree, Tensor.detach), grad), expected, near)


@pytest.mark.parametrize("name", [None, *ON_CPU])
@pytest.mark.parametrize("first", [TRAIN, EVAL, NormCase("batch")], ids=["train", "eval", "batch"])
def test_one_value_per_channel_is_an_error_in_train_mode(name: str | None, first: NormCase) -> None:
    case = Case((1, 3, 1, 1), ((StepCase(4, 1, first), StepCase(2, 3)),))
    for module in (plain, backend):
        with kernels.use(name) if name else nullcontext(), pytest.raises(ValueError, match="more"):
            module.dense_block(*build(case, torch.float32))


@every_kernel
@pytest.mark.parametrize("norm", [TRAIN, EVAL], ids=["train", "eval"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spreads_as_in_plain(name: str, norm: NormCase, value: float) -> None:
    x, layers = build(block((2, 3, 9, 9), norm=norm, count=2), torch.float32)
    x.detach()[1, 1, 2, 3] = value
    grad = gradient(block((2, 3, 9, 9), count=2), torch.float32)
    expected = run(plain, x, layers, grad)
    with fused(name):
        got = run(backend, x, layers, grad)
    for ours, theirs in zip(got.statistics.values(), expected.statistics.values(), strict=True):
        assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
    assert np.array_equal(np.isnan(got.output), np.isnan(expected.output))
    broken = [np.isfinite(one.grads["x"]).all() for one in (got, expected)]
    assert broken[0] == broken[1]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("norm", [TRAIN, EVAL], ids=["train", "eval"])
def test_relu_of_nan_lets_the_gradient_through_as_in_plain(name: str, norm: NormCase) -> None:
    x, layers = build(block((2, 4, 5, 5), norm=norm, count=2), torch.float32)
    x.detach()[0, 1, 2, 2] = math.nan
    grad = gradient(block((2, 4, 5, 5), count=2), torch.float32)
    expected = run(plain, x, layers, grad)
    with fused(name):
        got = run(backend, x, layers, grad)
    biases = [key for key in expected.grads if key.endswith("norm.bias")]
    assert len(biases) == 4
    for key in biases[:-1]:  # the last one is read by nobody: no norm spreads the NaN there
        np.testing.assert_allclose(got.grads[key], expected.grads[key], rtol=1e-3, atol=1e-3)
    assert norm is EVAL or np.isnan(expected.grads[biases[1]]).any()


def test_gradients_of_gradients_reach_the_output_as_in_plain() -> None:
    """Asked for, and by hooks, which must not take the input's gradient for the output's."""
    x, layers = build(block((2, 3, 5, 5), count=2))
    x = x.detach().requires_grad_()
    found = []
    for module in (plain, backend):
        output = module.dense_block(x, layers)
        output.register_hook(lambda g: 2 * g + 0.1)
        (first,) = torch.autograd.grad((output**3).sum(), x, create_graph=True)
        second = torch.autograd.grad((first**2).sum(), (output, x), retain_graph=True)
        # Read by sums alone, the output has no part in the second backward.
        unwatched = module.dense_block(x, layers)
        (first,) = torch.autograd.grad(unwatched.sum(), x, create_graph=True)
        found.append((*second, *torch.autograd.grad((first**2).sum(), x)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every_kind
def test_channels_that_do_not_vary(dtype: torch.dtype, name: str, near: float) -> None:
    case = block((3, 4, 5, 3))
    x, layers = build(case, dtype)
    x.detach()[:, 1] = 0.0
    x.detach()[:, 2] = 4.0
    expected = oracle(x, layers, gradient(case, dtype))
    with fused(name):
        assert_same(run(backend, x, layers, gradient(case, dtype)), expected, 10 * near)


@every_kernel
def test_output_may_be_changed_in_place_or_it_is_an_error(name: str) -> None:
    case = block()
    x, layers = build(case, torch.float32)
    grad = gradient(case, torch.float32)
    tree = fresh(Inputs(x, layers))
    with kernels.use(name):
        out = backend.dense_block(*tree)
        try:
            out.mul_(3.0)
            got = outcome(out, tree, grad)
        except RuntimeError:
            return
    expected = oracle(x, layers, 3.0 * grad)
    assert_same(got, expected._replace(output=3.0 * expected.output), 1e-4)


# torch.compile.


def test_compiles_to_the_same() -> None:
    case = block((2, 3, 4, 4), count=1)
    case = case._replace(layers=(*case.layers, *block(width=None, norm=EVAL, count=1).layers))
    x, layers = build(case, torch.float32)
    grad = gradient(case, torch.float32)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x: Tensor, layers: tuple[Layer, ...]) -> Tensor:
        return 2.0 * backend.dense_block(x, layers)

    tree = fresh(Inputs(x, layers))
    got = outcome(call(*tree), tree, grad)
    expected = run(backend, x, layers, 2.0 * grad)
    assert_same(got, expected._replace(output=2.0 * expected.output), 1e-5)
