"""Random stems, transitions and final norms, and what they give by their definitions."""

from types import ModuleType
from typing import Any, NamedTuple

import block_oracle
import numpy as np
import pytest
import torch
from block_cases import (
    TRAIN,
    Maker,
    NormCase,
    outcome,
)
from block_oracle import Result, arrays, fresh
from torch import Tensor

from densely.fused.plain import Conv, Norm


class Parts(NamedTuple):
    norm: Norm
    conv: Conv | None


class Inputs(NamedTuple):
    """What a step reads; its tensors are named as the oracle names them."""

    x: Tensor
    layers: Parts


class Case(NamedTuple):
    """`window`: of a transition, or the stride of a stem; `out`: channels of a transition."""

    unit: str
    shape: tuple[int, ...]
    norm: NormCase = NormCase()
    window: tuple[int, ...] = ()
    out: int = 3
    bias: bool = False
    learnt: float = 1.0
    x_learnt: bool = True
    seed: int = 0

    def call(self, module: Any, x: Any, parts: Any) -> Any:
        """The step as a module has it, or, given a gradient too, as the oracle has it."""
        if self.unit == "transition":
            return module.transition(x, parts.norm, parts.conv, self.window)
        if self.unit == "stem":
            return module.stem(x, parts.norm, self.window)
        return module.final(x, parts.norm)

    def exactly(self, x: Any, parts: Any, grad: Any) -> Result:
        """The oracle's result from arrays."""
        if self.unit == "transition":
            return block_oracle.transition(x, parts.norm, parts.conv, self.window, grad)
        if self.unit == "stem":
            return block_oracle.stem(x, parts.norm, self.window, grad)
        return block_oracle.final(x, parts.norm, grad)

    @property
    def counted_as(self) -> str:
        return "final norm" if self.unit == "final" else self.unit

    @property
    def out_shape(self) -> tuple[int, ...]:
        space = self.shape[2:]
        if self.unit == "transition":
            less = (n // w for n, w in zip(space, self.window, strict=True))
            return (self.shape[0], self.out, *less)
        if self.unit == "stem":
            less = ((n - 1) // s + 1 for n, s in zip(space, self.window, strict=True))
            return (*self.shape[:2], *less)
        return self.shape[:2]


def build(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    make = Maker(case.seed, case.learnt, dtype)
    x = make.normal(*case.shape).add_(0.3).requires_grad_(case.x_learnt)
    norm, conv = make.norm(case.norm, case.shape[1]), None
    if case.unit == "transition":
        size = (1,) * len(case.window)
        conv = make.conv(case.out, case.shape[1], size, case.bias, 1)
    return Inputs(x, Parts(norm, conv))


def gradient(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    return Maker(case.seed + 1, dtype=dtype).normal(*case.out_shape)


def oracle(case: Case, tree: Inputs, grad: Tensor) -> Result:
    return case.exactly(*arrays(tree), arrays(grad))


def run(module: ModuleType, case: Case, tree: Inputs, grad: Tensor) -> Result:
    """One step on copies."""
    copy, kept = fresh(tree), grad.clone()
    result = outcome(case.call(module, *copy), copy, grad)
    before = arrays(tree.x)
    assert np.array_equal(arrays(copy.x), before, equal_nan=True), "the step changed its input"
    assert torch.equal(grad, kept), "the step changed the gradient of its output"
    return result


def some(norm: NormCase = TRAIN, space: tuple[int, ...] = (5, 7)) -> dict[str, Case]:
    """One case of each step; sizes are such that pooling leaves something over."""
    shape, two = (3, 4, *space), (2,) * len(space)
    return {
        "transition": Case("transition", shape, norm, two, bias=True),
        "uneven": Case("transition", shape, norm, (1, *two[1:]), out=9),
        "no pooling": Case("transition", shape, norm, (1,) * len(space)),
        "stem": Case("stem", shape, norm, two),
        "stem of stride 1": Case("stem", shape, norm, (1,) * len(space)),
        "final": Case("final", shape, norm),
    }


SOME = some()
every_unit = pytest.mark.parametrize("case", SOME.values(), ids=SOME)
BOTH = {
    f"{key} {mode}": case
    for mode in ("train", "eval")
    for key, case in some(NormCase(mode)).items()
}
every_mode = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
