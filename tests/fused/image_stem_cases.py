"""Stems that begin with the images: operands, what they give, and what they must give."""

from typing import Any, NamedTuple

import block_oracle
import torch
from block_cases import EVAL, Maker, NormCase, outcome
from block_oracle import Result, arrays, fresh
from torch import Tensor

from densely.fused import plain
from densely.fused.plain import FirstConv, Norm


class Parts(NamedTuple):
    norm: Norm
    conv: FirstConv


class Inputs(NamedTuple):
    """What a stem reads; its tensors are named as the oracle names them."""

    x: Tensor
    layers: Parts


class Case(NamedTuple):
    """`shape` of the images, `out` channels of the convolution, `window` and `pad` of it."""

    shape: tuple[int, ...] = (2, 1, 15, 12)
    out: int = 5
    window: tuple[int, int] = (7, 7)
    stride: tuple[int, int] = (2, 2)
    pad: tuple[int, int] = (3, 3)
    pool: tuple[int, int] = (2, 2)
    norm: NormCase = NormCase()
    bias: bool = False
    learnt: float = 1.0
    seed: int = 0


#: Every branch: channels, windows of all sorts, outputs of more than a tile, both modes, biases.
CASES = {
    "grey": Case(),
    "colour": Case((2, 3, 13, 16), 7, (3, 3), pad=(1, 1)),
    "bias": Case(bias=True),
    "eval": Case(norm=EVAL, bias=True),
    "colour in eval": Case((2, 3, 11, 11), window=(3, 3), pad=(1, 1), norm=EVAL),
    "uneven": Case((3, 2, 14, 9), 6, (5, 3), (1, 2), (2, 1), (1, 2)),
    "unpadded": Case((2, 1, 14, 14), 4, (3, 4), (1, 1), (0, 0), (2, 1)),
    "many outputs": Case((1, 1, 11, 11), 70),
    "one norm frozen": Case(learnt=0.5, bias=True, seed=3),
    "no parameters in the norm": Case(norm=NormCase(weight=False, bias=False)),
}


def build(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    """Images of 0 to 1, as they come, with a black border."""
    make = Maker(case.seed, case.learnt, dtype)
    images = make.uniform(*case.shape)
    images[..., :3] = 0
    norm = make.norm(case.norm, case.out)
    conv = make.conv(case.out, case.shape[1], case.window, case.bias, 1)
    return Inputs(images, Parts(norm, FirstConv(conv.weight, conv.bias, case.stride, case.pad)))


def call(module: Any, case: Case, tree: Inputs) -> Tensor:
    """The stem as a module has it."""
    output: Tensor = module.image_stem(tree.x, tree.layers.conv, tree.layers.norm, case.pool)
    return output


def gradient(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad():
        shape = call(plain, case, fresh(build(case))).shape
    return Maker(case.seed + 1, dtype=dtype).normal(*shape)


def run(module: Any, case: Case, tree: Inputs, grad: Tensor) -> Result:
    """One stem on copies."""
    copy = fresh(tree)
    result = outcome(call(module, case, copy), copy, grad)
    assert torch.equal(copy.x, tree.x), "the stem changed its images"
    return result


def oracle(case: Case, tree: Inputs, grad: Tensor) -> Result:
    x, (norm, conv) = arrays(tree)
    return block_oracle.image_stem(x, conv, norm, case.pool, arrays(grad))
