"""A dense block's layers as the flat lists that an operator takes, and back.

Operators of `torch.library` take tensors, numbers and lists of these, nothing else.
"""

from collections.abc import Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from densely.fused import coefficients, plain
from densely.fused.kernels.operands import Affine, Convolution, NormVectors, Space

_TRAINING, _CONV_BIAS, _MASK, _LAST = 1, 2, 4, 8


class Packed(NamedTuple):
    """Layers as an operator gets them: for each step its tensors, two flags and two numbers."""

    tensors: list[Tensor]
    flags: list[int]
    numbers: list[float]


class PackedStep(NamedTuple):
    """One step, unpacked. `places` says where its tensors stand among the packed ones.

    `mask` [rows, O] is true where dropout, of which `keep_rate` remains, has kept a value.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    training: bool
    dilation: int
    eps: float
    keep_rate: float
    places: dict[str, int]

    def norm(self, moments: tuple[Tensor, Tensor]) -> NormVectors:
        """Its norm, which goes by these moments in train mode, by its own else."""
        mean, var = moments
        if self.running_mean is not None and self.running_var is not None:
            mean, var = self.running_mean, self.running_var
        return NormVectors(self.norm_weight, self.norm_bias, mean, var, self.eps, self.training)

    def convolution(self, affine: Affine, space: Space) -> Convolution:
        """What kernels take."""
        return Convolution(affine, self.weight, self.bias, self.dilation, space)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of [rows, O], and its backward."""
        if self.mask is None:
            return x
        return torch.where(self.mask, x * (1 / self.keep_rate if self.keep_rate else 0.0), 0.0)


def pack(x: Tensor, layers: tuple[plain.Layer, ...]) -> Packed:
    """Flatten the layers that work on x [N, C, *space], and draw what their dropouts drop."""
    packed = Packed([], [], [])
    own = [plain.own_statistics(step.norm) for layer in layers for step in layer]
    statistics_of_all = iter(coefficients.as_they_are([*chain.from_iterable(own)]))
    for layer in layers:
        for i, (norm, conv, drop_rate, drop_maps) in enumerate(layer):
            statistics = () if plain.takes_batch(norm) else islice(statistics_of_all, 2)
            mask = None
            if drop_rate > 0:
                width = conv.weight.shape[0]
                mask = _dropout_mask(x, width, drop_rate, drop_maps, _layout(layers))
            learnt = coefficients.parameters(norm, x, conv.weight.shape[1])
            tensors = (*learnt, *statistics, conv.weight, conv.bias, mask)
            packed.tensors.extend(tensor for tensor in tensors if tensor is not None)
            flags = (
                plain.takes_batch(norm),
                conv.bias is not None,
                mask is not None,
                i + 1 == len(layer),
            )
            packed.flags.append(sum(1 << bit for bit, flag in enumerate(flags) if flag))
            packed.flags.append(conv.dilation)
            packed.numbers.extend((norm.eps, 1 - drop_rate))
    return packed


def unpack(
    tensors: Sequence[Tensor],
    flags: Sequence[int],
    numbers: Sequence[float],
) -> list[list[PackedStep]]:
    """The layers, each a list of steps."""
    layers: list[list[PackedStep]] = [[]]
    at = 0
    for i in range(0, len(flags), 2):
        names = ["norm_weight", "norm_bias"]
        names += [] if flags[i] & _TRAINING else ["running_mean", "running_var"]
        names += ["weight"]
        names += ["bias"] if flags[i] & _CONV_BIAS else []
        names += ["mask"] if flags[i] & _MASK else []
        places = {name: at + n for n, name in enumerate(names)}
        at += len(names)
        found = {name: tensors[place] for name, place in places.items()}
        layers[-1].append(
            PackedStep(
                found["norm_weight"],
                found["norm_bias"],
                found.get("running_mean"),
                found.get("running_var"),
                found["weight"],
                found.get("bias"),
                found.get("mask"),
                bool(flags[i] & _TRAINING),
                flags[i + 1],
                numbers[i],
                numbers[i + 1],
                places,
            )
        )
        if flags[i] & _LAST:
            layers.append([])
    return layers[:-1]


def convert(
    layers: list[list[PackedStep]], dtype: torch.dtype, copies: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Put the convolutions' weights and biases in place in a dtype: see `coefficients.in_dtype`.

    Returns those that had to be copied; as many of a weight that several steps share.
    """
    weights = [
        tensor
        for layer in layers
        for step in layer
        for tensor in (step.weight, step.bias)
        if tensor is not None
    ]
    typed, copies = coefficients.in_dtype(weights, dtype, copies)
    if copies:
        remaining = iter(typed)
        for layer in layers:
            for i, step in enumerate(layer):
                weight = next(remaining)
                layer[i] = step._replace(
                    weight=weight, bias=None if step.bias is None else next(remaining)
                )
    return copies


def _dropout_mask(
    x: Tensor, channels: int, rate: float, maps: bool, layout: torch.memory_format
) -> Tensor:
    """Where a dropout keeps [rows, channels], by the draws that plain PyTorch would make."""
    space = Space(x.shape[0], tuple(x.shape[2:]))
    ones = torch.ones(
        (space.batch, channels, *space.size), dtype=x.dtype, device=x.device
    ).contiguous(memory_format=layout)
    return space.matrix(plain.dropout(ones, rate, maps) != 0).contiguous()


def _layout(layers: tuple[plain.Layer, ...]) -> torch.memory_format:
    """The memory order of maps in plain PyTorch: that of the weights."""
    for weight in (step.conv.weight for layer in layers for step in layer):
        order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
        if order and weight.is_contiguous(memory_format=order) and not weight.is_contiguous():
            return order
    return torch.contiguous_format
