"""Operands with which no ReLU's input is so near zero that rounding decides on which side it is.

One value on the other side moves the gradient of its channel by 1 / sqrt(rows), in float32 a
thousand times as far as rounding does, so that it would hide mistakes and look like one. The biases
of norms are moved, a little and in float64, so that zero lies in a gap.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densely.fused import restore

#: How far a bias may be moved, of a norm's output, whose deviation is about 1.
REACH = 0.1


@contextmanager
def clear_of_zero() -> Iterator[None]:
    """Within it batch norms of plain float64 code change their biases as they run.

    In place, and one after another: each sees what those before it make with their new biases.
    """
    batch_norm = F.batch_norm

    def moved(x: Tensor, mean: Any, var: Any, weight: Any, bias: Tensor, *more: Any) -> Tensor:
        with torch.no_grad():
            y = batch_norm(x, mean, var, weight, bias, *more)
            by = shift_to_gap(y.movedim(1, 0).flatten(1))
            bias += by
            return y + by.view(-1, *[1] * (y.dim() - 2))

    with mock.patch.object(F, "batch_norm", moved):
        yield


def clear_norms(model: nn.Module, images: Tensor) -> None:
    """Move the biases of a network's norms so that no value is near zero behind them.

    Args:
        model: of any precision; nothing else in it changes.
        images: a batch on its device.
    """
    exact = copy.deepcopy(model)
    restore(exact)
    exact.double()
    with clear_of_zero():
        exact(images.double())
    with torch.no_grad():
        for norm, moved in zip(batch_norms(model), batch_norms(exact), strict=True):
            norm.bias.copy_(moved.bias)


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """All of a network, in its order."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def shift_to_gap(values: Tensor) -> Tensor:
    """What to add to each row so that zero is in the widest gap that `REACH` allows.

    Args:
        values: [rows, some], finite.

    Returns:
        [rows], in their middle or `REACH` from their ends.
    """
    ends = values.new_full((len(values), 1), torch.inf)
    ordered = torch.cat((-ends, values.sort(dim=1).values, ends), dim=1)
    left, right = ordered[:, :-1], ordered[:, 1:]
    clear = ((right - left) / 2).clamp(max=REACH)
    place = torch.zeros_like(left).clamp(min=left + clear).clamp(max=right - clear)
    found = clear.where(place.abs() <= REACH, -1.0).argmax(dim=1, keepdim=True)
    return -place.gather(1, found).squeeze(1)
