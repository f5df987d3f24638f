"""Weights held against those that a network wants."""

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")


class Mismatch(NamedTuple, Generic[K]):
    """What does not fit: names that are missing or unexpected, and tensors of another kind.

    Args:
        missing: names that the network has and the weights have not.
        unexpected: names that the weights have and the network has not.
        wrong: name, tensor given and tensor wanted, of another shape or kind of number.
    """

    missing: list[K]
    unexpected: list[K]
    wrong: list[tuple[K, Tensor, Tensor]]


def mismatch(given: Mapping[K, Tensor], wanted: Mapping[K, Tensor]) -> Mismatch[K]:
    """Hold weights against a network's, by name or by place."""
    return Mismatch(
        [name for name in wanted if name not in given],
        [name for name in given if name not in wanted],
        [
            (name, given[name], value)
            for name, value in wanted.items()
            if name in given and not fits(given[name], value)
        ],
    )


def fits(value: Tensor, target: Tensor) -> bool:
    """Whether `value` can be copied into `target`: same shape and kind of numbers, all there."""
    return (
        value.shape == target.shape
        and value.layout == torch.strided
        and not value.is_quantized
        and not (value.is_meta and not target.is_meta)
        and not value.is_complex()
        and value.dtype != torch.bool
        and (value.is_floating_point() == target.is_floating_point() or _counts(value))
    )


def _counts(value: Tensor) -> bool:
    """Whether it is a whole number in a floating type: batches seen, of a model cast to half."""
    return value.is_floating_point() and value.dim() == 0 and float(value).is_integer()
