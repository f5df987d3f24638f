"""The steps of a network one by one: random operands of its real shapes, and what a run gives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densely.fused import backend, plain
from densely.fused.plain import Conv, FirstConv, Layer, Norm, Step
from gpu_check.setting import CheckedNet

#: Everything that a run has made, by name.
Outcome = dict[str, Tensor]
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class StepCase:
    """A step of a network.

    Args:
        name: in tables.
        kind: as `backend.fused_calls` counts it, where kernels make the image stem.
        channels: of its input.
        size: side of its input's maps.
        make: its operands in a mode, from a generator, float32.
        reads_images: whether nobody asks for the gradient of its input.
    """

    name: str
    kind: str
    channels: int
    size: int
    make: Callable[[torch.Generator, bool], tuple[Any, ...]]
    reads_images: bool = False

    @property
    def fused(self) -> Callable[..., Tensor]:
        return _FUSED[self.kind]

    @property
    def plain(self) -> Callable[..., Tensor]:
        return _PLAIN[self.kind]


_FUSED: dict[str, Callable[..., Tensor]] = {
    "dense block": backend.dense_block,
    "transition": backend.transition,
    "image stem": backend.image_stem,
    "stem": backend.stem,
    "final norm": backend.final,
}
_PLAIN: dict[str, Callable[..., Tensor]] = {
    "dense block": plain.dense_block,
    "transition": plain.transition,
    "image stem": plain.image_stem,
    "stem": plain.stem,
    "final norm": plain.final,
}


def cases(net: CheckedNet) -> Iterator[StepCase]:
    """All steps of a network, in its order."""
    channels, size = net.stem_channels, net.first_size
    if net.pooled_stem:
        yield _image_stem(net, channels)
        yield _stem(net, channels, 2 * size)
    for i, layers in enumerate(net.blocks):
        yield _block(net, i + 1, channels, layers, size)
        channels += layers * net.growth_rate
        if i + 1 < len(net.blocks):
            yield _transition(net, i + 1, channels, size)
            channels, size = channels // 2, size // 2
    yield _final(net, channels, size)


def _image_stem(net: CheckedNet, channels: int) -> StepCase:
    def make(generator: torch.Generator, training: bool) -> tuple[Any, ...]:
        conv = _conv(net.in_channels, channels, 7, net.bias, generator)
        first = FirstConv(conv.weight, conv.bias, (2, 2), (3, 3))
        return first, _norm(channels, generator, training), (2, 2)

    name = f"{net.name} image stem"
    return StepCase(name, "image stem", net.in_channels, net.image_size, make, reads_images=True)


def _stem(net: CheckedNet, channels: int, size: int) -> StepCase:
    def make(generator: torch.Generator, training: bool) -> tuple[Any, ...]:
        return _norm(channels, generator, training), (2, 2)

    return StepCase(f"{net.name} stem", "stem", channels, size, make)


def _block(net: CheckedNet, number: int, channels: int, layers: int, size: int) -> StepCase:
    def layer(read: int, generator: torch.Generator, training: bool) -> Layer:
        k, bias = net.growth_rate, net.bias
        first = _norm(read, generator, training)
        if net.bn_size is None:
            return (Step(first, _conv(read, k, 3, bias, generator)),)
        width = net.bn_size * k
        return (
            Step(first, _conv(read, width, 1, bias, generator)),
            Step(_norm(width, generator, training), _conv(width, k, 3, bias, generator)),
        )

    def make(generator: torch.Generator, training: bool) -> tuple[Any, ...]:
        reads = [channels + i * net.growth_rate for i in range(layers)]
        return (tuple(layer(read, generator, training) for read in reads),)

    return StepCase(f"{net.name} block {number}", "dense block", channels, size, make)


def _transition(net: CheckedNet, number: int, channels: int, size: int) -> StepCase:
    def make(generator: torch.Generator, training: bool) -> tuple[Any, ...]:
        conv = _conv(channels, channels // 2, 1, net.bias, generator)
        return _norm(channels, generator, training), conv, (2, 2)

    return StepCase(f"{net.name} transition {number}", "transition", channels, size, make)


def _final(net: CheckedNet, channels: int, size: int) -> StepCase:
    def make(generator: torch.Generator, training: bool) -> tuple[Any, ...]:
        return (_norm(channels, generator, training),)

    return StepCase(f"{net.name} final", "final norm", channels, size, make)


def _norm(channels: int, generator: torch.Generator, training: bool) -> Norm:
    def uniform(low: float, high: float) -> Tensor:
        return _uniform(channels, generator) * (high - low) + low

    return Norm(
        weight=uniform(0.5, 1.5),
        bias=uniform(-0.5, 0.5),
        running_mean=uniform(-0.3, 0.3),
        running_var=uniform(0.5, 2.0),
        num_batches_tracked=torch.tensor(3, device=generator.device),
        momentum=0.1,
        eps=1e-5,
        training=training,
    )


def _conv(read: int, made: int, size: int, bias: bool, generator: torch.Generator) -> Conv:
    weight = normal((made, read, size, size), generator) * (2 / (read * size * size)) ** 0.5
    return Conv(
        weight.contiguous(memory_format=torch.channels_last),
        normal((made,), generator) * 0.1 if bias else None,
    )


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device)


def images_like(case: StepCase, batch: int, generator: torch.Generator) -> Tensor:
    """Random float32 maps whose channels differ in mean and spread, channels-last."""
    spread = _uniform(case.channels, generator) + 0.5
    mean = normal((case.channels,), generator) * 0.5
    rows = normal((batch, case.size, case.size, case.channels), generator)
    return (rows * spread + mean).permute(0, 3, 1, 2)


def outcome(
    run: Callable[..., Tensor],
    x: Tensor,
    operands: tuple[Any, ...],
    upstream: Tensor,
    autocast: AbstractContextManager[object],
    x_learns: bool,
    training: bool,
) -> Outcome:
    """Run a step forward and backward on copies; the copies' gradients and statistics.

    The gradient of x is among them if `x_learns`, and unless in `training` what the step gives
    where nothing is kept for backward, which has code of its own.
    """
    copies = mapped(operands, lambda tensor: tensor.detach().clone())
    x = x.detach().clone().requires_grad_(x_learns)
    leaves = dict(named(copies))
    for name, tensor in leaves.items():
        tensor.requires_grad_(name.rpartition(".")[2] not in _STATISTICS)
    with autocast:
        y = run(x, *copies)
    y.backward(upstream.to(y.dtype))  # type: ignore[no-untyped-call]
    found = {"output": y.detach()} | ({"gradient of x": _there(x.grad)} if x_learns else {})
    if not training:
        with torch.no_grad(), autocast:
            found["output at inference"] = run(x, *copies)
    for name, tensor in leaves.items():
        if tensor.requires_grad:
            found[f"gradient of {name}"] = _there(tensor.grad)
        else:
            found[name] = tensor
    return found


def _there(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, each tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if not isinstance(value, tuple):
        return value
    parts = [mapped(part, change) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def named(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a nest of tuples, with their places as names: "0.2.1.conv.weight"."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            name = value._fields[i] if hasattr(value, "_fields") else _KINDS.get(type(part), i)
            yield from named(part, f"{path}.{name}".strip("."))


_KINDS = {Norm: "norm", Conv: "conv", FirstConv: "conv"}
