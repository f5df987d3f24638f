"""Random dense blocks, what they give, and how that is compared; for the tests of fused code."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import block_oracle
import numpy as np
import pytest
import torch
from block_oracle import Masks, Result, arrays, change, differences, distances, fresh, named
from hypothesis import strategies as st
from torch import Tensor

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


# Draws of Hypothesis.


@st.composite
def norm_cases(draw: Callable[..., Any], modes: tuple[str, ...]) -> NormCase:
    return NormCase(
        draw(st.sampled_from(modes)),
        draw(st.sampled_from([0.1, None, 0.37, 1.0])),
        draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        *draw(st.sampled_from([(True, True), (True, True), (False, False), (True, False)])),
    )


MODES = ("train", "eval", "batch", "batch in train")


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


def with_norms(case: Case, norm: NormCase) -> Case:
    return case._replace(
        layers=tuple(tuple(s._replace(norm=norm) for s in layer) for layer in case.layers)
    )


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


NUMBERS = ["float32", "bfloat16", "float16", "autocast"]


def asking(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.clone().requires_grad_() for value in values)


def storages(tensors: Any) -> dict[int, int]:
    """Where the memory of some tensors lies and how large it is."""
    memory = [tensor.untyped_storage() for tensor in tensors]
    return {one.data_ptr(): one.nbytes() for one in memory}
