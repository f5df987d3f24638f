"""Gradients that nobody else holds, whose memory a backward may therefore write to.

The gradient of a dense block's output is as large as the block, and backward adds to it what layer
after layer hands back. Where it has been made for this block alone, as by a transition, no copy of
it is needed: at the largest block that is a quarter of what a training step holds at its peak.
Autograd does not tell, but counts: whoever else holds the gradient is among its owners, be it a
hook that has kept it, a view or an array of its memory, or `torch.autograd.grad`, which will return
it. Memory that is not PyTorch's own, as an array's, may have owners that nobody counts.

Calls in Python hold what they are given, too, and more of it while PyTorch's compiler sees each
call, or for good once it has failed. The count to compare with is therefore taken where calls hold
the least, and what a call holds is part of it: where that differs, owners cannot be told from
calls, and memory is left alone.
"""

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.utils._python_dispatch import _disable_current_modes


class Owners(NamedTuple):
    """How many hold a tensor, the one that it is a view of, and their memory.

    The first of each pair are names in Python, the second what C++ counts.
    """

    kind: type  # of a plain tensor, or of one that stands for another
    of_call: int  # what a call holds of its argument
    of_tensor: tuple[int, int]
    of_base: tuple[int, int]
    of_storage: tuple[int, int]
    own_memory: bool


def owners(grad: Tensor) -> Owners | None:
    """Of a gradient, as an autograd function's backward sees it under one name.

    None where they cannot be counted: this asks what PyTorch promises nobody.
    """
    try:
        storage: Any = grad.untyped_storage()
        tensor: Any = grad
        base: Any = grad._base
        return Owners(
            type(grad),
            _held_by_a_call(object()),
            (sys.getrefcount(grad), tensor._use_count()),
            (0, 0) if base is None else (sys.getrefcount(base), base._use_count()),
            (sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)),
            storage.resizable(),
        )
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None


def sole_owners() -> tuple[Owners | None, ...]:
    """Those of a gradient that a backward alone has been given: of a whole tensor, or of a view.

    Not to be asked for within a backward, since it runs one.
    """
    compiler = eval_frame.set_eval_frame(None)
    try:
        return _sole_owners(_held_by_a_call(object()))
    finally:
        eval_frame.set_eval_frame(compiler)


def _held_by_a_call(given: object) -> int:
    return sys.getrefcount(given)


@functools.cache
def _sole_owners(_held: int) -> tuple[Owners | None, ...]:
    """Anew once a compiler has failed."""
    return tuple(_probed(view) for view in (False, True))


class _Probe(torch.autograd.Function):
    """Counts where nobody else can hold anything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[Owners | None]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, None]:
        ctx.found.append(owners(grad))
        return grad, None


class _Maker(torch.autograd.Function):
    """Makes a gradient, whole or as a view of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, view: bool) -> Tensor:
        ctx.view = view
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        made = torch.zeros(2 * len(grad))
        return made[: len(grad)] if ctx.view else made[: len(grad)].clone(), None


def _probed(view: bool) -> Owners | None:
    found: list[Owners | None] = []
    alone = _disable_current_modes()  # as of a compiler, whose tensors have other owners
    with alone, torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        x = torch.ones(2, requires_grad=True)
        _Maker.apply(_Probe.apply(x, found), view).sum().backward()  # type: ignore[no-untyped-call]
    return found[0]
