"""The fused dense block: derivatives of other orders and kinds, and those of biases."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from block_cases import (
    EVAL,
    TRAIN,
    Case,
    Inputs,
    Maker,
    NormCase,
    StepCase,
    asking,
    build,
    every_kind,
    forward_mode,
    fused,
    gradient,
    oracle,
    with_norms,
)
from block_oracle import arrays, change, named
from torch import Tensor

from densely.fused import backend, kernels, plain

# Derivatives of other orders and kinds.


SMALL = Case(
    (2, 2, 3),
    ((StepCase(3, 1, bias=True), StepCase(2, 3, bias=True)), (StepCase(2, 3, dilation=2),)),
    seed=5,
)


def function(
    module: ModuleType, case: Case, dtype: torch.dtype = torch.float64
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A block as a function of x and its parameters, which changes no statistics of others."""
    tree = Inputs(*build(case, dtype))
    learnt = [name for name, t in named(tree).items() if t.requires_grad]

    def call(*values: Tensor) -> Tensor:
        given, names = dict(zip(learnt, values, strict=True)), iter(named(tree))

        def pick(tensor: Tensor) -> Tensor:
            name = next(names)
            return given[name] if name in given else tensor.detach().clone()

        torch.manual_seed(0)
        return module.dense_block(*change(tree, pick))

    return call, tuple(named(tree)[name].detach().clone() for name in learnt)


MODE_CASES = {
    "train": SMALL,
    "eval": with_norms(SMALL, EVAL),
    "dropout": Case((2, 2, 3), ((StepCase(3, 1, drop_rate=0.3), StepCase(2, 3, drop_rate=0.5)),)),
}
every_mode = pytest.mark.parametrize("case", MODE_CASES.values(), ids=MODE_CASES)


@every_mode
def test_gradcheck(case: Case) -> None:
    call, values = function(backend, case)
    with kernels.use("reference"):
        assert torch.autograd.gradcheck(call, asking(values))


@every_mode
def test_gradgradcheck(case: Case) -> None:
    call, values = function(backend, case)
    with kernels.use("reference"):
        assert torch.autograd.gradgradcheck(call, asking(values), fast_mode=True)


@every_kind
@every_mode
def test_gradients_of_gradients_equal_those_of_plain(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    found = []
    for module in (plain, backend):
        call, values = function(module, case, dtype)
        values = asking(values)
        with kernels.use(name):
            out = call(*values)
            grads = torch.autograd.grad(out.square().sum(), values, create_graph=True)
            total = sum(grad.square().sum() for grad in grads)
            found.append(torch.autograd.grad(total, values, allow_unused=True))
    largest = max(float(one.abs().max()) for one in found[0] if one is not None)
    for theirs, ours, value in zip(*found, values, strict=True):
        theirs, ours = (torch.zeros_like(value) if t is None else t for t in (theirs, ours))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=near * largest)


@forward_mode
@every_kind
@every_mode
def test_forward_mode_equals_plain(dtype: torch.dtype, name: str, near: float, case: Case) -> None:
    found = []
    for module in (plain, backend):
        call, values = function(module, case, dtype)
        make = Maker(3, dtype=dtype)
        tangents = [make.normal(*value.shape) for value in values]
        with kernels.use(name), fwAD.dual_level():
            duals = [fwAD.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
            found.append(fwAD.unpack_dual(call(*duals)))
    torch.testing.assert_close(found[1], found[0], rtol=near, atol=near * 10)


BATCH = with_norms(SMALL, NormCase("batch in train"))
FUNCTIONAL = {"eval": MODE_CASES["eval"], "batch": BATCH}


@forward_mode
@every_kind
@pytest.mark.parametrize("case", FUNCTIONAL.values(), ids=FUNCTIONAL)
@pytest.mark.parametrize("transform", ["grad", "vmap", "grad of each", "ensemble", "jvp of grad"])
def test_functional_transforms_equal_plain(
    dtype: torch.dtype, name: str, near: float, case: Case, transform: str
) -> None:
    found = []
    for module in (plain, backend):
        call, values = function(module, case, dtype)
        every = tuple(range(len(values)))
        many = torch.stack([values[0], values[0].flip(2), -values[0]])

        def loss(*values: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
            return call(*values).square().mean()

        each = (0, *[None] * (len(values) - 1))
        with kernels.use(name):
            if transform == "grad":
                made = torch.func.grad(loss, every)(*values)
            elif transform == "vmap":
                made = (torch.func.vmap(call, each)(many, *values[1:]),)
            elif transform == "grad of each":
                made = torch.func.vmap(torch.func.grad(loss, every), each)(many, *values[1:])
            elif transform == "ensemble":
                stacked = [torch.stack([value, value.flip(0)]) for value in values]
                made = (torch.func.vmap(call)(*stacked),)
            else:
                tangents = tuple(value.flip(0) for value in values)
                made = torch.func.jvp(torch.func.grad(loss, every), values, tangents)[1]
        found.append(made)
    torch.testing.assert_close(found[1], found[0], rtol=near, atol=near * 10)


# The bias of a convolution that a norm follows.


def first_bias(case: Case, name: str, dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
    """The gradient of the first layer's first bias, and what it should be."""
    x, layers = build(case, dtype)
    grad = gradient(case, dtype)
    expected = oracle(x, layers, grad).grads["0.0.conv.bias"]
    torch.manual_seed(0)
    with fused(name):
        out = backend.dense_block(x, layers)
        (found,) = torch.autograd.grad(out, layers[0][0].conv.bias, grad)
    return found, expected


@every_kind
@pytest.mark.parametrize("second", [TRAIN, NormCase("batch")], ids=["train", "batch"])
@pytest.mark.parametrize("x_learnt", [True, False])
def test_bias_before_the_norm_of_a_batch_has_no_gradient(
    dtype: torch.dtype, name: str, near: float, second: NormCase, x_learnt: bool
) -> None:
    layer = (StepCase(6, 1, EVAL, bias=True), StepCase(4, 3, second, bias=True, drop_rate=0.3))
    case = Case((3, 3, 5, 4), (layer, layer), x_learnt=x_learnt)
    found, _ = first_bias(case, name, dtype)
    assert torch.equal(found, torch.zeros(6, dtype=dtype))


BIASED = {
    "eval": (StepCase(6, 1, EVAL, bias=True), StepCase(4, 3, EVAL)),
    "frozen second norm": (StepCase(6, 1, TRAIN, bias=True), StepCase(4, 3, EVAL)),
    "dropout": (StepCase(6, 1, bias=True, drop_rate=0.4), StepCase(4, 3)),
    "dropped maps": (StepCase(6, 1, bias=True, drop_rate=0.4, drop_maps=True), StepCase(4, 3)),
}


@every_kind
@pytest.mark.parametrize("layer", BIASED.values(), ids=BIASED)
def test_bias_before_another_norm_has_one(
    dtype: torch.dtype, name: str, near: float, layer: tuple[StepCase, ...]
) -> None:
    found, expected = first_bias(Case((3, 3, 5, 4), (layer, layer)), name, dtype)
    assert np.abs(expected).max() > 1e-2
    assert np.abs(arrays(found) - expected).max() <= 10 * near * np.abs(expected).max()
