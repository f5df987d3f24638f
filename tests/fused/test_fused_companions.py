"""The fused stem, transition and final norm against their definitions, and plain PyTorch."""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from block_cases import (
    EVAL,
    MODES,
    NUMBERS,
    TRAIN,
    Maker,
    NormCase,
    asking,
    assert_same,
    cast,
    every_kernel,
    every_kind,
    finite_differences,
    forward_mode,
    fused,
    is_no_worse,
    norm_cases,
    outcome,
    storages,
)
from block_oracle import Result, arrays, change, differences, fresh, named
from companion_cases import (
    BOTH,
    SOME,
    Case,
    Inputs,
    Parts,
    build,
    every_mode,
    every_unit,
    gradient,
    oracle,
    run,
    some,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from densely.fused import backend, kernels, plain
from densely.fused.plain import Norm

# The oracle itself.


@pytest.mark.parametrize("space", [(5,), (5, 4), (3, 2, 5)], ids=["1D", "2D", "3D"])
@pytest.mark.parametrize("unit", SOME)
def test_oracle(unit: str, space: tuple[int, ...]) -> None:
    """It agrees with finite differences and with plain PyTorch."""
    for norm in (TRAIN, EVAL):
        case = some(norm, space)[unit]
        tree, grad = build(case), gradient(case)
        assert finite_differences(*arrays(tree), arrays(grad), case.exactly) == []
        assert_same(run(plain, case, tree, grad), oracle(case, tree, grad))


# Any step.


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    unit = draw(st.sampled_from(["transition", "stem", "final"]))
    dims = draw(st.integers(1, 3))
    most = {1: 40, 2: 17, 3: 5}[dims]
    window = tuple(draw(st.integers(1, 2 if unit == "stem" else 3)) for _ in range(dims))
    space = tuple(draw(st.integers(w if unit == "transition" else 1, most)) for w in window)
    shape = (draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 16, 33, 64])), *space)
    alone = shape[0] * math.prod(space) == 1
    return Case(
        unit,
        shape,
        draw(norm_cases(("eval",) if alone else MODES)),
        window,
        draw(st.sampled_from([1, 3, 7, 12, 32])),
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 0.5, 0.0])),
        draw(st.booleans()),
        draw(st.integers(0, 999)),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_any_step_equals_the_oracle(case: Case) -> None:
    tree, grad = build(case), gradient(case)
    with fused(None, case.counted_as):
        assert_same(run(backend, case, tree, grad), oracle(case, tree, grad))


@every_kernel
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_any_step_is_near_the_oracle_in_float32(name: str, case: Case) -> None:
    tree, grad = build(case, torch.float32), gradient(case, torch.float32)
    expected = oracle(case, tree, grad)
    with fused(name, case.counted_as):
        got = run(backend, case, tree, grad)
    if expected.margin < 1e-5:  # an input of ReLU may fall on either side
        got, expected = got._replace(grads={}), expected._replace(grads={})
    assert_same(got, expected, 1e-3)


@every_kind
@pytest.mark.parametrize(
    "shape", [(3, 1, 4, 4), (2, 3, 6, 5), (1, 17, 9), (1, 2, 3, 4, 3)], ids=str
)
def test_of_equal_maxima_the_first_has_the_gradient(
    dtype: torch.dtype, name: str, near: float, shape: tuple[int, ...]
) -> None:
    case = Case("stem", shape, EVAL, (2,) * (len(shape) - 2))
    make, ones, zeros = Maker(7, dtype=dtype), torch.ones(shape[1]), torch.zeros(shape[1])
    x = make.normal(*shape).round().requires_grad_()  # few values, each many times
    weight, bias, mean, var = (t.to(dtype, copy=True) for t in (ones, ones / 2, zeros, ones))
    for parameter in (weight, bias):
        parameter.requires_grad_()
    norm = Norm(weight, bias, mean, var, torch.tensor(0), 0.1, 0.0, False)
    tree, grad = Inputs(x, Parts(norm, None)), gradient(case, dtype)
    with fused(name, "stem"):
        assert_same(run(backend, case, tree, grad), oracle(case, tree, grad), near)


# Other numbers than float64.


LARGE = {
    "transition": Case("transition", (4, 96, 16, 16), TRAIN, (2, 2), 48),
    "stem": Case("stem", (4, 32, 32, 32), TRAIN, (2, 2)),
    "final": Case("final", (8, 160, 7, 7)),
}


@functools.cache
def large(unit: str, kind: str, mode: str) -> tuple[Case, Inputs, Tensor, Result, Result]:
    case = LARGE[unit]._replace(norm=NormCase(mode))
    dtype, computed_in, place = cast(kind)
    tree = build(case, dtype)
    tree = tree._replace(x=tree.x.detach().to(computed_in).requires_grad_())
    grad = gradient(case, computed_in)
    with place:
        plainly = run(plain, case, tree, grad)
    return case, tree, grad, plainly, oracle(case, tree, grad)


@every_kernel
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("unit", LARGE)
def test_no_further_from_float64_than_plain(unit: str, kind: str, mode: str, name: str) -> None:
    case, tree, grad, plainly, expected = large(unit, kind, mode)
    _, computed_in, place = cast(kind)
    with place, fused(name, case.counted_as):
        got = run(backend, case, tree, grad)
        out = case.call(backend, *fresh(tree))
        backend.fused_calls[case.counted_as] -= 1
    with place:
        assert out.dtype == case.call(plain, *fresh(tree)).dtype
    if unit == "stem" and computed_in.itemsize == 2:
        # Values that differ may be rounded to equal ones: which is the maximum is then chance.
        off = np.linalg.norm(got.grads.pop("x") - expected.grads["x"])
        assert off <= 0.05 * np.linalg.norm(expected.grads["x"])
    assert is_no_worse(got, plainly, expected, computed_in) == []


@every_kernel
@pytest.mark.parametrize("unit", LARGE)
def test_far_from_zero(unit: str, name: str) -> None:
    case = LARGE[unit]
    tree, grad = build(case, torch.float32), gradient(case, torch.float32)
    tree = tree._replace(x=(tree.x.detach() + 100).requires_grad_())
    results = [run(plain, case, tree, grad)]
    with fused(name, case.counted_as):
        results.append(run(backend, case, tree, grad))
    theirs, ours = results
    assert is_no_worse(ours, theirs, oracle(case, tree, grad), torch.float32, 5.0) == []


# Derivatives of other orders and kinds.


def function(
    module: ModuleType, case: Case, dtype: torch.dtype = torch.float64
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A step as a function of x and its parameters, which changes no statistics of others."""
    tree = build(case, dtype)
    learnt = [name for name, t in named(tree).items() if t.requires_grad]

    def call(*values: Tensor) -> Tensor:
        given, names = dict(zip(learnt, values, strict=True)), iter(named(tree))

        def pick(tensor: Tensor) -> Tensor:
            name = next(names)
            return given[name] if name in given else tensor.detach().clone()

        return case.call(module, *change(tree, pick))

    return call, tuple(named(tree)[name].detach().clone() for name in learnt)


@every_mode
def test_gradcheck(case: Case) -> None:
    call, values = function(backend, case._replace(shape=(2, 2, 2, 3), out=2))
    with kernels.use("reference"):
        assert torch.autograd.gradcheck(call, asking(values))
        assert torch.autograd.gradgradcheck(call, asking(values), fast_mode=True)


@forward_mode
@every_kind
@every_mode
def test_other_derivatives_equal_those_of_plain(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    found: list[list[Any]] = [[], []]
    for module, made in zip((plain, backend), found, strict=True):
        call, values = function(module, case, dtype)
        tangents = [Maker(3, dtype=dtype).normal(*value.shape) for value in values]
        asked = asking(values)
        with kernels.use(name):
            with fwAD.dual_level():
                duals = [fwAD.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
                made += fwAD.unpack_dual(call(*duals))
            grads = torch.autograd.grad(call(*asked).square().sum(), asked, create_graph=True)
            total = sum(grad.square().sum() for grad in grads)
            made += torch.autograd.grad(total, asked, materialize_grads=True)
    for ours, theirs in zip(found[1], found[0], strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=near * max(scale, 1.0))


FUNCTIONAL = {
    f"{key} {mode}": case
    for mode in ("eval", "batch in train")
    for key, case in some(NormCase(mode)).items()
}


@forward_mode
@every_kind
@pytest.mark.parametrize("case", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional_transforms_equal_plain(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    found: list[list[Any]] = [[], []]
    for module, made in zip((plain, backend), found, strict=True):
        call, values = function(module, case, dtype)
        every, each = tuple(range(len(values))), (0, *[None] * (len(values) - 1))
        many = torch.stack([values[0], values[0].flip(2), -values[0]])

        def loss(*values: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
            return call(*values).square().mean()

        with kernels.use(name):
            made += torch.func.grad(loss, every)(*values)
            made.append(torch.func.vmap(call, each)(many, *values[1:]))
            made += torch.func.vmap(torch.func.grad(loss, every), each)(many, *values[1:])
            made.append(torch.func.vmap(call)(*(torch.stack([v, v.flip(0)]) for v in values)))
    torch.testing.assert_close(found[1], found[0], rtol=near, atol=near * 10)


# How it is called.


@every_kind
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", ["channels last", "strided", "expanded", "offset"])
def test_any_layout(dtype: torch.dtype, name: str, near: float, layout: str, batch: int) -> None:
    def lay_out(t: Tensor) -> Tensor:
        if layout == "channels last":
            return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t
        if layout == "strided":
            return torch.stack([t, -t], -1)[..., 0]
        if layout == "offset":
            return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
        return t

    wrong = {}
    for key, one in BOTH.items():
        case = one._replace(shape=(batch, *one.shape[1:]))
        tree, grad = build(case, dtype), gradient(case, dtype)
        if layout == "expanded":
            grad = grad[:, :1].expand(grad.shape)
        expected = oracle(case, tree, grad)
        grad = lay_out(grad)
        tree = change(tree, lambda t: lay_out(t.detach()).requires_grad_(t.requires_grad))
        with fused(name, case.counted_as):
            got = outcome(case.call(backend, *tree), tree, grad)
        if found := differences(got, expected, near):
            wrong[key] = found
    assert wrong == {}


@every_kind
@every_mode
def test_without_gradients(dtype: torch.dtype, name: str, near: float, case: Case) -> None:
    tree, grad = build(case, dtype), gradient(case, dtype)
    expected = oracle(case, tree, grad)
    for without in (torch.no_grad, torch.inference_mode):
        copy = fresh(tree)
        with without(), fused(name, case.counted_as):
            out = case.call(backend, *copy).clone()
            got = outcome(out, change(copy, Tensor.detach), grad)
        assert_same(got, expected, near)


@every_kind
@every_mode
def test_repeated(dtype: torch.dtype, name: str, near: float, case: Case) -> None:
    """Two runs give the same bits; backward twice leaves the statistics alone."""
    tree, grad = build(case, dtype), gradient(case, dtype)
    with fused(name, case.counted_as, times=3):
        first, second = (run(backend, case, tree, grad).all() for _ in range(2))
        copy = fresh(tree)
        learnt = [t for t in named(copy).values() if t.requires_grad]
        out = case.call(backend, *copy)
        for _ in range(2):
            torch.autograd.grad(out, learnt, grad, retain_graph=True)
    for key, value in first.items():
        assert np.array_equal(value, second[key]), key
    left = outcome(out.detach(), change(copy, Tensor.detach), grad)
    assert_same(left, oracle(case, tree, grad), near)


@pytest.mark.parametrize("name", [None, *(n for n in kernels.available() if n != "triton")])
@pytest.mark.parametrize("unit", ["transition", "stem", "final"])
def test_one_value_per_channel_is_an_error_in_train_mode(name: str | None, unit: str) -> None:
    case = Case(unit, (1, 3, 1, 1), TRAIN, (1, 1))
    for module in (plain, backend):
        with kernels.use(name) if name else nullcontext(), pytest.raises(ValueError, match="more"):
            case.call(module, *build(case, torch.float32))


@every_kernel
@every_mode
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spreads_as_in_plain(name: str, case: Case, value: float) -> None:
    case = case._replace(shape=(2, 3, 9, 9))
    tree, grad = build(case, torch.float32), gradient(case, torch.float32)
    tree.x.detach()[1, 1, 4, 5] = value
    tree.x.detach()[1, 2, 0, 0] = value
    expected = run(plain, case, tree, grad)
    with fused(name, case.counted_as):
        got = run(backend, case, tree, grad)
    for ours, theirs in zip(got.statistics.values(), expected.statistics.values(), strict=True):
        assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
    assert np.array_equal(np.isnan(got.output), np.isnan(expected.output))


@every_kind
@every_mode
def test_what_is_saved_for_backward_is_small(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    """The input; of a transition what its convolution reads; of a stem where maxima are."""
    case = case._replace(shape=(4, 16, 12, 12))
    tree, size = build(case, dtype), dtype.itemsize
    packed: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(packed.append, lambda none: none)
    with kernels.use(name), hooks:
        case.call(backend, *tree)
    owned = storages(named(tree.layers).values())
    saved = [size for at, size in storages(packed).items() if at not in owned]
    inputs, pooled = tree.x.numel(), math.prod((4, 16, *case.out_shape[2:]))
    more = {"transition": size * pooled, "stem": 8 * pooled, "final": 0}[case.unit]
    assert sum(saved) <= size * (inputs + 20 * 16) + more


@every_kind
@every_unit
def test_gradients_from_what_was_moved_away_and_back(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    tree, grad = build(case, dtype), gradient(case, dtype)
    expected = oracle(case, tree, grad)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
        with fused(name, case.counted_as):
            assert_same(run(backend, case, tree, grad), expected, near)
        copy = fresh(tree)
    with kernels.use(name):
        out = checkpoint(lambda *tree: case.call(backend, *tree), *copy, use_reentrant=False)
        got = outcome(out, copy, grad)._replace(statistics={})
    assert_same(got, expected._replace(statistics={}), near)


# torch.compile.


def test_compiles_to_the_same() -> None:
    torch._dynamo.reset()
    units = [SOME[key] for key in ("stem", "transition", "final")]
    trees = [build(case, torch.float32) for case in units]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(trees: Any) -> list[Tensor]:
        return [case.call(backend, *tree) for case, tree in zip(units, trees, strict=True)]

    copies = tuple(fresh(tree) for tree in trees)
    outs = call(copies)
    learnt = {name: t for name, t in named(copies).items() if t.requires_grad}
    grads = [gradient(case, torch.float32) for case in units]
    found = dict(zip(learnt, torch.autograd.grad(outs, [*learnt.values()], grads), strict=True))
    for i, (case, tree, grad) in enumerate(zip(units, trees, grads, strict=True)):
        expected = run(backend, case, tree, grad)
        left = outcome(outs[i].detach(), change(copies[i], Tensor.detach), grad)
        mine = {key.partition(".")[2]: arrays(g) for key, g in found.items() if key[0] == str(i)}
        mine = {key.removeprefix("layers."): value for key, value in mine.items()}
        assert mine.keys() == expected.grads.keys()
        assert_same(left._replace(grads=mine), expected, 1e-5)
