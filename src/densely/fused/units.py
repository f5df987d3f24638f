"""The four units that are replaced, and how each runs as one step of densely's.

A plan is made in each call: it looks at the inner modules, takes their tensors, and so knows
what to run; or it meets an obstacle.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densely.fused import backend, parts
from densely.fused.accelerated import Accelerated, Kind, original_class
from densely.fused.calls import note
from densely.fused.coefficients import learning_together
from densely.fused.dialects import Dialect, known_class
from densely.fused.heads import Head
from densely.fused.parts import Obstacle, qualified_name
from densely.fused.plain import Conv, FirstConv, Layer, Norm


class Plan(NamedTuple):
    """What to run on an input with that many dimensions of space.

    `norms` and `convs` are those of the fused step, on whose tensors it depends whether it may run.
    """

    dims: int
    run: Callable[[Tensor], Tensor]
    norms: tuple[Norm, ...]
    convs: tuple[Conv, ...] = ()


class Unit(NamedTuple):
    """A kind of module that is replaced, and how a call of it is planned."""

    kind: Kind
    plan: Callable[[nn.Module], Plan | Obstacle]


class Stem(NamedTuple):
    """Where the stem stands among a net's features: from child `start` up to, not with, `stop`.

    It begins with the first convolution, `conv`, or with the norm where that is not as plain.
    """

    start: int
    stop: int
    conv: FirstConv | None
    norm: Norm
    dims: int
    stride: tuple[int, ...]


def unit_of(cls: type[nn.Module]) -> Unit | str | None:
    """How to replace modules of this class; text says why not to; None: it is no unit."""
    if cls is nn.Sequential:
        return Unit("stem", plan_features)
    known = known_class(cls)
    if known is None or isinstance(known, str):
        return known
    if known.kind == "dense block":
        return Unit(known.kind, partial(plan_block, dialect=known.dialect))
    if known.kind == "transition":
        return Unit(known.kind, partial(plan_transition, dialect=known.dialect))
    return Unit(known.kind, partial(plan_net, dialect=known.dialect))


def plan_block(block: nn.Module, dialect: Dialect) -> Plan | Obstacle:
    """All layers of a dense block as one step."""
    layers: list[Layer] = []
    dims = 0  # the first layer says how many
    for name, module in block._modules.items():
        layer = _read_layer(module, dialect, dims)
        if isinstance(layer, Obstacle):
            return layer.inside(name)
        layers.append(layer)
        dims = layer[0].conv.weight.dim() - 2
    if not layers:
        return Obstacle("has no layers")
    steps = [step for layer in layers for step in layer]
    return Plan(
        dims,
        partial(backend.dense_block, layers=tuple(layers)),
        tuple(step.norm for step in steps),
        tuple(step.conv for step in steps),
    )


def plan_transition(transition: nn.Module, dialect: Dialect) -> Plan | Obstacle:
    """A whole transition as one step."""
    modules = transition._modules
    dims = parts.dims_of(modules.get("norm"))
    obstacle = parts.examine(modules, dialect.transition_parts, dims, optional=("pool",))
    if obstacle is not None:
        return obstacle
    norm, conv = parts.read_norm(modules["norm"]), parts.read_conv(modules["conv"])
    pool: Any = modules.get("pool")
    window = parts.each_axis(pool.kernel_size if pool else 1, dims)
    run = partial(backend.transition, norm=norm, conv=conv, window=window)
    return Plan(dims, run, (norm,), (conv,))


def plan_features(features: nn.Module) -> Plan | Obstacle:
    """A net's features, with the stem as one step among its children."""
    stem = _read_stem(features)
    if isinstance(stem, Obstacle):
        return stem
    modules = tuple(features._modules.values())
    return Plan(stem.dims, partial(_run_features, modules=modules, stem=stem), (stem.norm,))


def plan_net(net: nn.Module, dialect: Dialect) -> Plan | Obstacle:
    """A whole net, with its last norm, the ReLU and the global average as one step."""
    features = net._modules.get("features")
    if features is None or original_class(features) is not nn.Sequential:
        return Obstacle(f"is of type {type(features).__name__}", where="features")
    name, norm = next(reversed(features._modules.items()), ("", None))
    dims = parts.dims_of(norm)
    obstacle = parts.examine({name: norm}, {name: dialect.transition_parts["norm"]}, dims)
    obstacle = obstacle or parts.watched(features)
    if obstacle is not None:
        return obstacle.inside("features")
    head = dialect.read_head(net, dims)
    if isinstance(head, Obstacle):
        return head
    obstacle = parts.patched(net, dialect.net_methods)
    if obstacle is not None:
        return obstacle
    read = parts.read_norm(norm)
    check = getattr(net, dialect.check_input) if dialect.check_input else None
    run = partial(_run_net, check=check, features=features, norm=read, head=head)
    return Plan(dims, run, (read,))


def _read_layer(layer: nn.Module | None, dialect: Dialect, dims: int) -> Layer | Obstacle:
    if layer is None or qualified_name(type(layer)) != dialect.layer:
        return Obstacle(f"is of type {type(layer).__name__}")
    obstacle = parts.watched(layer) or parts.patched(layer, dialect.layer_methods)
    if obstacle is not None:
        return obstacle
    modules: Mapping[str, nn.Module | None] = layer._modules
    if dialect.layer_child:
        holder = modules.get(dialect.layer_child)
        if type(holder) is not nn.Sequential:
            return Obstacle(f"is of type {type(holder).__name__}", where=dialect.layer_child)
        obstacle = parts.watched(holder)
        modules = holder._modules
    dims = dims or parts.dims_of(modules.get("norm1"))
    obstacle = obstacle or parts.examine(modules, dialect.layer_parts, dims, dialect.layer_optional)
    if obstacle is not None:
        return obstacle.inside(dialect.layer_child)
    *earlier, last = parts.read_steps(modules)
    rate: Any = getattr(layer, "drop_rate", None)  # of a function, where there is no module
    if layer.training and rate:
        last = last._replace(drop_rate=float(rate))
    return (*earlier, last)


def _read_stem(features: nn.Module) -> Stem | Obstacle:
    names, modules = list(features._modules), list(features._modules.values())
    stop = 1 + next((i for i, module in enumerate(modules) if parts.is_max_pool(module)), -1)
    checks: tuple[parts.Check, ...] = (parts.norm, parts.relu, parts.max_pool)
    if stop > 1 and parts.is_timm_norm(modules[stop - 2]):
        checks = (parts.norm_act, parts.max_pool)
    start = stop - len(checks)
    if start < 0:
        return Obstacle("has no norm, ReLU and max pooling in a row")
    dims = parts.dims_of(modules[start])
    obstacle = parts.examine(
        dict(zip(names[start:stop], modules[start:stop], strict=True)),
        dict(zip(names[start:stop], checks, strict=True)),
        dims,
    )
    if obstacle is not None:
        return obstacle
    pool: Any = modules[stop - 1]
    stride = parts.each_axis(pool.stride, dims)
    norm, conv = parts.read_norm(modules[start]), None
    if start > 0:
        before = {names[start - 1]: modules[start - 1]}
        if parts.examine(before, {names[start - 1]: parts.first_conv}, dims) is None:
            start -= 1
            conv = parts.read_first_conv(modules[start], dims)
    return Stem(start, stop, conv, norm, dims, stride)


def _run_features(x: Tensor, modules: tuple[Any, ...], stem: Stem) -> Tensor:
    x = _run_in_turn(x, modules[: stem.start])
    if stem.conv is None:
        x = backend.stem(x, stem.norm, stem.stride)
    else:
        x = backend.image_stem(x, stem.conv, stem.norm, stem.stride)
    return _run_in_turn(x, modules[stem.stop :])


def _run_net(
    x: Tensor,
    check: Callable[[Tensor], None] | None,
    features: nn.Module,
    norm: Norm,
    head: Head,
) -> Tensor:
    if check is not None:
        check(x)
    modules = tuple(features._modules.values())[:-1]
    stem = _read_stem(features) if isinstance(features, Accelerated) else None
    with nullcontext() if torch.compiler.is_compiling() else learning_together():
        if isinstance(stem, Stem):
            note(features, None)
            x = _run_features(x, modules, stem)
        else:
            if stem is not None:
                note(features, stem)
            x = _run_in_turn(x, modules)
        x = backend.final(x, norm)
    return _run_in_turn(x, head)


def _run_in_turn(x: Tensor, modules: Iterable[Any]) -> Tensor:
    for module in modules:
        x = module(x)
    return x
