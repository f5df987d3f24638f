"""Parameters beside the fused steps: as they take them, their gradients, what norms learn."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from densely.fused.plain import Norm


def parameters(norm: Norm, x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias [channels] of a norm on maps like x; 1 and 0 where it has none."""
    weight, bias = norm.weight, norm.bias
    return (
        x.new_ones(channels) if weight is None else weight,
        x.new_zeros(channels) if bias is None else bias,
    )


def as_they_are(statistics: Sequence[Tensor]) -> list[Tensor]:
    """Running statistics to normalise by now: copies, if a backward may follow.

    Until then a batch in train mode may change them in place, as where two passes share one loss.
    """
    compiling = torch.compiler.is_compiling()  # compilers keep what they need themselves
    if compiling or not torch.is_grad_enabled():
        return list(statistics)
    return _copies(statistics)


def in_places(found: Iterable[Tensor], needed: Iterable[bool]) -> list[Tensor | None]:
    """The gradients that were found, each where one is needed, and None elsewhere."""
    remaining = iter(found)
    return [next(remaining) if need else None for need in needed]


def in_dtype(
    tensors: Sequence[Tensor], dtype: torch.dtype, copies: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors in a dtype, and those of them that had to be copied.

    The copies of an earlier call with the same tensors may be given, instead of making them again.
    """
    others = [tensor for tensor in tensors if tensor.dtype != dtype]
    if copies is None:
        copies = _copies(others, dtype)
    remaining = iter(copies)
    return [t if t.dtype == dtype else next(remaining) for t in tensors], list(copies)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Of all tensors by one launch, in a dtype or their own."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's dtype and memory order, as compilers are told it has."""
    axes = zip(parameter.shape, gradient.stride(), parameter.stride(), strict=True)
    same_order = all(size == 1 or one == other for size, one, other in axes)
    if gradient.dtype != parameter.dtype or not same_order:
        return torch.empty_like(parameter).copy_(gradient)
    if gradient.stride() != parameter.stride():
        # Along an axis of one place any stride is the same memory; compilers go by its number.
        gradient = gradient.as_strided(parameter.shape, parameter.stride())
    return gradient.detach()  # no view, which nobody could change in place


class _Taken(NamedTuple):
    """What a norm saw of a batch: mean and biased variance [C] of so many rows."""

    norm: Norm
    mean: Tensor
    var: Tensor
    rows: int


_waiting: ContextVar[dict[int, _Taken] | None] = ContextVar("waiting", default=None)


def update_running_statistics(norms: Iterable[tuple[Norm, Tensor, Tensor]], rows: int) -> None:
    """Let norms in train mode learn batch means and biased variances, as nn.BatchNorm does.

    All learn at once, so no norm may be among them twice. Within `learning_together` they wait.
    """
    found = {
        id(norm.running_mean): _Taken(norm, mean, var, rows)
        for norm, mean, var in norms
        if norm.training and norm.running_mean is not None
    }
    waiting = None if torch.compiler.is_compiling() else _waiting.get()
    if waiting is None:
        _update(found.values())
        return
    if waiting.keys() & found.keys():  # a module that runs twice learns twice, in turn
        _update(waiting.values())
        waiting.clear()
    waiting.update(found)


@contextmanager
def learning_together() -> Iterator[None]:
    """Let the norms of all steps within learn at its end: some launches instead of some a step.

    They do so where that end is an exception too. Who looks at a norm in between, as from a hook,
    sees what it had learnt before.
    """
    waiting: dict[int, _Taken] = {}
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)
        _update(waiting.values())


def _update(found: Iterable[_Taken]) -> None:
    counts: list[Tensor] = []
    by_momentum: dict[float, _Learning] = {}  # no defaultdict, which PyTorch 2.11 cannot compile
    with torch.no_grad():
        for norm, mean, var, rows in found:
            if norm.running_mean is None or norm.running_var is None:
                continue
            momentum = norm.momentum
            if momentum is None:  # the mean over all batches so far
                count = norm.num_batches_tracked
                momentum = 0.0 if count is None else 1.0 / (float(count) + 1)
            if momentum not in by_momentum:
                by_momentum[momentum] = _Learning()
            learning = by_momentum[momentum]
            learning.running_means.append(norm.running_mean)
            learning.running_vars.append(norm.running_var)
            learning.means.append(mean.to(norm.running_mean.dtype))
            learning.vars.append(var)
            learning.unbiased.append(rows / (rows - 1))
            if norm.num_batches_tracked is not None:
                counts.append(norm.num_batches_tracked)
        for momentum, learning in by_momentum.items():
            unbiased = torch._foreach_mul(learning.vars, learning.unbiased)
            typed = [
                new.to(old.dtype) for new, old in zip(unbiased, learning.running_vars, strict=True)
            ]
            torch._foreach_lerp_(learning.running_means, learning.means, momentum)
            torch._foreach_lerp_(learning.running_vars, typed, momentum)
        if counts:
            torch._foreach_add_(counts, 1)


class _Learning:
    """Norms of one momentum, as lists beside each other."""

    def __init__(self) -> None:
        self.running_means: list[Tensor] = []
        self.running_vars: list[Tensor] = []
        self.means: list[Tensor] = []
        self.vars: list[Tensor] = []
        self.unbiased: list[float] = []  # factors of the variances
