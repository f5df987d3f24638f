"""The fused dense block against its definition in float64 NumPy, and against plain PyTorch."""

import functools
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import block_oracle
import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from block_oracle import Masks, Result, arrays, change, differences, distances, fresh, named
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from densely.fused import backend, kernels, plain
from densely.fused.plain import Conv, Layer, Norm, Step

EXACT = 1e-10
#: Sets for tensors on a CPU; that for GPUs has tests of its own.
ON_CPU = [name for name in kernels.available() if name != "triton"]
every_kernel = pytest.mark.parametrize("name", ON_CPU)

Tree = Any


# Networks that hide no mistake.


class NormCase(NamedTuple):
    """`mode`: train, eval, or "batch": without running statistics, in train or eval mode."""

    mode: str = "train"
    momentum: float | None = 0.1
    eps: float = 1e-5
    weight: bool = True
    bias: bool = True


class StepCase(NamedTuple):
    out: int
    size: int
    norm: NormCase = NormCase()
    bias: bool = False
    dilation: int = 1
    drop_rate: float = 0.0
    drop_maps: bool = False


class Case(NamedTuple):
    """`learnt`: the share of parameters that ask for a gradient."""

    shape: tuple[int, ...]
    layers: tuple[tuple[StepCase, ...], ...]
    learnt: float = 1.0
    x_learnt: bool = True
    seed: int = 0


class Maker:
    """Random tensors: weights of both signs and zero among them, statistics far from 0 and 1."""

    def __init__(self, seed: int, learnt: float = 1.0, dtype: torch.dtype = torch.float64) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.learnt = learnt
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def parameter(self, value: Tensor) -> Tensor:
        return value.requires_grad_(float(self.uniform(1)) < self.learnt)

    def norm(self, case: NormCase, channels: int) -> Norm:
        weight = 1 + 0.5 * self.normal(channels)
        weight[self.uniform(channels) < 0.1] = 0.0
        weight[self.uniform(channels) < 0.1] *= -1.0
        statistics = (
            0.5 * self.normal(channels),
            0.3 + self.uniform(channels),
            torch.randint(5, (), generator=self.random),
        )
        return Norm(
            self.parameter(weight) if case.weight else None,
            self.parameter(0.5 * self.normal(channels)) if case.bias else None,
            *((None, None, None) if case.mode.startswith("batch") else statistics),
            case.momentum,
            case.eps,
            case.mode in ("train", "batch in train"),
        )

    def conv(
        self, out: int, channels: int, size: tuple[int, ...], bias: bool, dilation: int
    ) -> Conv:
        weight = self.normal(out, channels, *size) / math.sqrt(channels * math.prod(size))
        return Conv(
            self.parameter(weight),
            self.parameter(0.3 * self.normal(out)) if bias else None,
            dilation,
        )

    def step(self, case: StepCase, channels: int, dims: int) -> Step:
        conv = self.conv(case.out, channels, (case.size,) * dims, case.bias, case.dilation)
        return Step(self.norm(case.norm, channels), conv, case.drop_rate, case.drop_maps)


def build(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, tuple[Layer, ...]]:
    make = Maker(case.seed, case.learnt, dtype)
    x = make.normal(*case.shape).add_(0.3).requires_grad_(case.x_learnt)
    channels, layers = case.shape[1], []
    for layer in case.layers:
        width, steps = channels, []
        for step in layer:
            steps.append(make.step(step, width, len(case.shape) - 2))
            width = step.out
        channels += width
        layers.append(tuple(steps))
    return x, tuple(layers)


def gradient(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    """A gradient of the block's output, about as large as that of a mean would be."""
    channels = case.shape[1] + sum(layer[-1].out for layer in case.layers)
    return Maker(case.seed + 1, dtype=dtype).normal(case.shape[0], channels, *case.shape[2:])


def draw_masks(x: Tensor, layers: tuple[Layer, ...], seed: int) -> Masks:
    """What dropout multiplies by if it draws from this seed."""
    torch.manual_seed(seed)
    masks: list[list[np.ndarray | None]] = []
    for layer in layers:
        masks.append([])
        for step in layer:
            masks[-1].append(None)
            if step.drop_rate > 0:
                ones = x.new_ones(x.shape[0], step.conv.weight.shape[0], *x.shape[2:])
                kept = plain.dropout(ones, step.drop_rate, step.drop_maps) != 0
                share = max(1 - step.drop_rate, 1e-9)
                masks[-1][-1] = arrays(kept) / share
    return masks


# What is compared.


class Inputs(NamedTuple):
    """What a block reads."""

    x: Tensor
    layers: tuple[Layer, ...]


def tensors(tree: Tree) -> dict[str, Any]:
    """All tensors or arrays of a step's inputs, as the oracle names them."""
    return {name.removeprefix("layers."): value for name, value in named(tree).items()}


def outcome(out: Tensor, tree: Tree, grad: Tensor) -> Result:
    """Output, the gradients of all that asks for one, and the statistics as they are now."""
    learnt = {name: t for name, t in tensors(tree).items() if t.requires_grad}
    assert out.requires_grad == bool(learnt)
    found = torch.autograd.grad(out, tuple(learnt.values()), grad) if learnt else ()
    for value, of in zip(found, learnt.values(), strict=True):
        assert (value.shape, value.dtype) == (of.shape, of.dtype)
    left = {n: t for n, t in tensors(tree).items() if n.endswith(block_oracle.STATISTICS)}
    return Result(
        arrays(out),
        dict(zip(learnt, map(arrays, found), strict=True)),
        {name: arrays(value) for name, value in left.items()},
    )


def run(
    module: ModuleType, x: Tensor, layers: tuple[Layer, ...], grad: Tensor, seed: int = 0
) -> Result:
    """One step of `module.dense_block` on copies."""
    tree = fresh(Inputs(x, layers))
    kept = grad.clone()
    torch.manual_seed(seed)
    result = outcome(module.dense_block(*tree), tree, grad)
    assert np.array_equal(arrays(tree.x), arrays(x), equal_nan=True), "the block changed its input"
    assert torch.equal(grad, kept), "the block changed the gradient of its output"
    return result


@contextmanager
def fused(name: str | None = None, unit: str = "dense block", times: int = 1) -> Iterator[None]:
    """These kernels, or the backend's choice, and an error unless the unit's calls ran fused."""
    before = backend.fused_calls[unit]
    with kernels.use(name) if name else nullcontext():
        yield
    assert backend.fused_calls[unit] - before == times, "did not run fused"


def oracle(x: Tensor, layers: tuple[Layer, ...], grad: Tensor, seed: int = 0) -> Result:
    masks = draw_masks(x, layers, seed)
    return block_oracle.dense_block(*arrays((x, layers)), masks, arrays(grad))


def assert_same(got: Result, expected: Result, tolerance: float = EXACT) -> None:
    assert set(got.grads) <= set(expected.grads)
    assert set(got.statistics) == set(expected.statistics)
    assert differences(got, expected, tolerance) == []


# The oracle itself.


def finite_differences(
    x: np.ndarray, parts: Tree, grad: np.ndarray, step: Callable[..., Result]
) -> list[str]:
    """Gradients of an oracle that do not say how its output moves; `step(x, parts, grad)`."""
    result, random, size, wrong = step(x, parts, grad), np.random.default_rng(0), 1e-6, []
    for name in result.grads:
        direction = random.normal(size=result.grads[name].shape)

        def moved(by: float, name: str = name, direction: np.ndarray = direction) -> float:
            names = iter(tensors(Inputs(x, parts)))

            def move(value: np.ndarray) -> np.ndarray:
                return value + by * direction if next(names) == name else value

            tree = change(Inputs(x, parts), move)
            return float((step(*tree, grad).output * grad).sum())

        slope = (moved(size) - moved(-size)) / (2 * size)
        expected = float((result.grads[name] * direction).sum())
        if not abs(slope - expected) <= 1e-6 * max(1.0, abs(expected)):
            wrong.append(f"{name}: {expected} for {slope}")
    return wrong


TRAIN, EVAL = NormCase(), NormCase("eval")
MIXED = Case(
    (2, 3, 4, 3),
    (
        (StepCase(4, 1, TRAIN, bias=True, drop_rate=0.3), StepCase(2, 3, EVAL, bias=True)),
        (StepCase(3, 3, NormCase("batch"), bias=True, dilation=2, drop_rate=0.5, drop_maps=True),),
        (StepCase(5, 1, EVAL, bias=True), StepCase(2, 3, NormCase(momentum=None))),
    ),
)


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


@st.composite
def norm_cases(draw: Callable[..., Any], modes: tuple[str, ...]) -> NormCase:
    return NormCase(
        draw(st.sampled_from(modes)),
        draw(st.sampled_from([0.1, None, 0.37, 1.0])),
        draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        *draw(st.sampled_from([(True, True), (True, True), (False, False), (True, False)])),
    )


MODES = ("train", "eval", "batch", "batch in train")
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


# Blocks as networks have them.


def block(
    shape: tuple[int, ...] = (2, 3, 5, 4),
    growth: int = 4,
    width: int | None = 6,
    norm: NormCase = TRAIN,
    count: int = 3,
    **options: Any,
) -> Case:
    """Layers that are all alike."""
    new = StepCase(growth, 3, norm, **options)
    layer = (new,) if width is None else (StepCase(width, 1, norm, **options), new)
    return Case(shape, (layer,) * count)


SHAPED = {"bottleneck": block(), "plain": block(width=None)}
LARGE = {
    "bottleneck": block((4, 64, 16, 16), 32, 128, count=4),
    "plain": block((4, 64, 16, 16), 32, None, count=4),
}

#: Numbers and kernels, with how near two ways to compute the same may be relative to its scale.
KINDS = [
    pytest.param(torch.float64, "reference", EXACT, id="float64"),
    *(pytest.param(torch.float32, name, 1e-4, id=name) for name in ON_CPU),
]
every_kind = pytest.mark.parametrize(("dtype", "name", "near"), KINDS)
#: torch uses its own deprecated compiler for derivatives in forward mode.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is dep:DeprecationWarning")
every_shape = pytest.mark.parametrize("case", SHAPED.values(), ids=SHAPED)


# Other numbers than float64.


def is_no_worse(
    got: Result, plain: Result, expected: Result, dtype: torch.dtype, times: float = 1.5
) -> list[str]:
    """The tensors that are further from the expected than 1.5 times as far as plain's."""
    ours, theirs = distances(got, expected), distances(plain, expected)
    ulp = torch.finfo(dtype).eps
    wrong = []
    for name, value in expected.all().items():
        if name not in ours:
            continue
        scale = float(np.linalg.norm(value))
        if not ours[name] <= times * theirs[name] + 2 * ulp * scale:
            wrong.append(f"{name}: {ours[name] / scale:.3g}, plain {theirs[name] / scale:.3g}")
    return wrong


def cast(kind: str) -> tuple[torch.dtype, torch.dtype, AbstractContextManager[Any]]:
    """The dtypes of the parameters and of what is computed, and where that is done."""
    if kind == "autocast":
        return torch.float32, torch.bfloat16, torch.autocast("cpu", torch.bfloat16)
    dtype = getattr(torch, kind)
    return dtype, dtype, nullcontext()


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


NUMBERS = ["float32", "bfloat16", "float16", "autocast"]


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


# Derivatives of other orders and kinds.


SMALL = Case(
    (2, 2, 3),
    ((StepCase(3, 1, bias=True), StepCase(2, 3, bias=True)), (StepCase(2, 3, dilation=2),)),
    seed=5,
)


def with_norms(case: Case, norm: NormCase) -> Case:
    return case._replace(
        layers=tuple(tuple(s._replace(norm=norm) for s in layer) for layer in case.layers)
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


def asking(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.clone().requires_grad_() for value in values)


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


# What is kept for backward.


def storages(tensors: Any) -> dict[int, int]:
    """Where the memory of some tensors lies and how large it is."""
    memory = [tensor.untyped_storage() for tensor in tensors]
    return {one.data_ptr(): one.nbytes() for one in memory}


KEPT = {
    **SHAPED,
    "eval": block(norm=EVAL),
    "dropout": block(drop_rate=0.3),
    "dropped maps": block(drop_rate=0.3, drop_maps=True),
    "plain with dropout": block(width=None, drop_rate=0.3),
    "bias": block(bias=True),
}


@pytest.fixture
def new_tensors() -> Iterator[Callable[[], Iterator[Tensor]]]:
    """Gives the tensors that came since the test began and that Python objects hold."""
    gc.collect()
    gc.freeze()
    yield lambda: (one for one in gc.get_objects() if issubclass(type(one), Tensor))
    gc.unfreeze()


@every_kind
@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_what_is_saved_for_backward_is_small(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    case = case._replace(shape=(4, 16, 12, 12))
    tree = Inputs(*build(case, dtype))
    pixels, size, steps = 4 * 12 * 12, dtype.itemsize, [s for layer in case.layers for s in layer]
    channels = 16 + sum(layer[-1].out for layer in case.layers)
    widths = sum(layer[0].out for layer in case.layers if len(layer) == 2)
    masks = sum(s.out * pixels for s in steps if s.drop_rate)  # a byte each
    vectors = 10 * len(steps) * channels

    packed: list[Tensor] = []
    with (
        kernels.use(name),
        torch.autograd.graph.saved_tensors_hooks(packed.append, lambda none: none),
    ):
        backend.dense_block(*tree)
    owned = storages(named(tree.layers).values())
    saved = [size for at, size in storages(packed).items() if at not in owned]
    assert sum(saved) <= size * (pixels * (channels + widths) + vectors) + masks


@every_kind
def test_nothing_large_is_kept_but_what_is_saved(
    dtype: torch.dtype, name: str, near: float, new_tensors: Any
) -> None:
    tree = Inputs(*build(KEPT["dropout"]._replace(shape=(4, 16, 12, 12)), dtype))
    packed: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(packed.append, lambda none: none)
    with kernels.use(name), hooks:
        out = backend.dense_block(*tree)
    assert packed
    known = storages([*packed, *named(tree).values(), out])
    kept = storages(new_tensors())
    assert [size for at, size in kept.items() if at not in known and size > 2000] == []


@every_kind
@pytest.mark.parametrize("case", [KEPT["dropout"], KEPT["plain"]], ids=["dropout", "plain"])
def test_gradients_from_what_was_moved_away_and_back(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    x, layers = build(case, dtype)
    grad = gradient(case, dtype)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone), fused(name):
        got = run(backend, x, layers, grad)
    assert_same(got, oracle(x, layers, grad), near)


@every_kind
def test_checkpointed_as_plain(dtype: torch.dtype, name: str, near: float) -> None:
    case = KEPT["dropout"]
    found = []
    for module in (plain, backend):
        tree = fresh(Inputs(*build(case, dtype)))
        torch.manual_seed(0)
        with kernels.use(name):
            out = checkpoint(module.dense_block, *tree, use_reentrant=False)
            found.append(outcome(out, tree, gradient(case, dtype)))
    # Whether the second forward comes as far as the statistics is the checkpoint's affair.
    assert_same(*(one._replace(statistics={}) for one in reversed(found)), near)


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
