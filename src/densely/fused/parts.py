"""Leaf modules of foreign DenseNets: whether each is as plain as densely's steps assume.

A step takes the tensors of its inner modules and never calls them. That is the same only while
each is exactly the stock module, with the settings of a DenseNet, and nobody watches it. Whatever
is not so is an `Obstacle`, and the original forward runs. All of this is looked at anew in each
call, so it is attributes and tables only: about a microsecond a module.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as hooks_of_all

from densely.fused.accelerated import original_class
from densely.fused.plain import Conv, FirstConv, Norm, Step


class Obstacle(NamedTuple):
    """Why densely's step may not run.

    Attributes:
        text: the reason, to be read after the name of a module: "has hooks".
        passing: hooks and flags come and go, while a module of another kind stays.
        where: the inner module that is in the way; empty for the unit itself.
        expected: nothing that a user might want to mend, or be told of.
    """

    text: str
    passing: bool = False
    where: str = ""
    expected: bool = False

    def inside(self, name: str) -> "Obstacle":
        """The same obstacle, seen from the module that holds `name`."""
        return self._replace(where=f"{name}.{self.where}".strip("."))

    def __str__(self) -> str:
        return f"{self.where} {self.text}" if self.where else self.text


#: Says what is wrong with a module in a net of that many dimensions of space; None for nothing.
Check = Callable[[Any, int], str | None]

_NORMS: dict[type, int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_AVG_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_MAX_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_GLOBAL_POOLS = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
_MAP_DROPOUTS: dict[type, int] = {nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}

#: Methods that classes are known to have had from the first, by class and name.
_own_methods: dict[tuple[type, str], Any] = {}

#: A setting of that value in each dimension, in all the ways to write it.
_EACH = {n: (n, (n,), (n, n), (n, n, n)) for n in range(4)}


def qualified_name(cls: type) -> str:
    """Where a class lives: "torchvision.models.densenet._DenseBlock"."""
    return f"{cls.__module__}.{cls.__qualname__}"


def watched(module: nn.Module) -> Obstacle | None:
    """Whether it would show that the module is not called: by hooks or a forward of its own."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return Obstacle("has hooks", passing=True)
    if module._compiled_call_impl is not None:
        return Obstacle("is compiled on its own", passing=True)
    return patched(module, ("forward",))


def patched(module: nn.Module, methods: Iterable[str]) -> Obstacle | None:
    """Whether a method was replaced, on the object itself or on its class."""
    for name in methods:
        if name in module.__dict__:
            return _another(name)
    return class_patched(module, methods)


def class_patched(module: nn.Module, methods: Iterable[str]) -> Obstacle | None:
    """Whether a method was replaced on the class: known is the one of the file of the class."""
    cls = original_class(module)
    return next((_another(name) for name in methods if not _is_own(cls, name)), None)


def _another(method: str) -> Obstacle:
    return Obstacle(f"was given another {method}", passing=True)


def everything_watched() -> Obstacle | None:
    """Whether hooks are set on every module there is, as profilers and counters do."""
    if (
        hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
    ):
        return Obstacle("runs under hooks on all modules", passing=True)
    return None


def examine(
    parts: Mapping[str, nn.Module | None],
    checks: Mapping[str, Check],
    dims: int,
    optional: tuple[str, ...] = (),
) -> Obstacle | None:
    """The first obstacle among modules that must be these, in this order."""
    checks = {
        name: check for name, check in checks.items() if name in parts or name not in optional
    }
    if tuple(parts) != tuple(checks):
        return Obstacle(f"holds {', '.join(parts) or 'nothing'}; known is {', '.join(checks)}")
    for name, module in parts.items():
        wrong = checks[name](module, dims)
        if module is None or wrong is not None:
            return Obstacle(wrong or "is missing", where=name)
        obstacle = watched(module)
        for inner in module._modules.values():  # timm's norm holds its activation
            obstacle = obstacle or (watched(inner) if inner else None)
        if obstacle is not None:
            return obstacle.inside(name)
    return None


def dims_of(norm: nn.Module | None) -> int:
    """Dimensions of space that a batch norm works on; 0 for another module."""
    return 2 if is_timm_norm(norm) else _NORMS.get(type(norm), 0)


def is_timm_norm(module: nn.Module | None) -> bool:
    """Whether this is timm's batch norm with a ReLU inside, known by its name alone."""
    return qualified_name(type(module)) == "timm.layers.norm_act.BatchNormAct2d"


def is_max_pool(module: nn.Module | None) -> bool:
    """Whether this pools by the maximum, in any way."""
    return type(module) in _MAX_POOLS


def norm(module: nn.Module, dims: int) -> str | None:
    """A batch norm without an activation."""
    return None if dims and _NORMS.get(type(module)) == dims else _kind(module)


def norm_act(module: nn.Module, dims: int) -> str | None:
    """A batch norm of timm's with nothing but a ReLU inside."""
    if not is_timm_norm(module) or dims != 2:
        return _kind(module)
    for name, plain in (("drop", nn.Identity), ("act", nn.ReLU)):
        inner = module._modules.get(name)
        if type(inner) is not plain:
            return f"has a {type(inner).__name__} for its {name}"
    return None


def relu(module: nn.Module, dims: int) -> str | None:
    """A ReLU, in place or not."""
    return None if type(module) is nn.ReLU else _kind(module)


def pointwise(module: nn.Conv2d, dims: int) -> str | None:
    """A 1x1 convolution."""
    return _conv(module, dims, 1)


def spatial(module: nn.Conv2d, dims: int) -> str | None:
    """A 3x3 convolution that keeps the size."""
    return _conv(module, dims, 3)


def conv(module: nn.Conv2d, dims: int) -> str | None:
    """A 1x1 or 3x3 convolution that keeps the size."""
    return _conv(module, dims, 1 if getattr(module, "kernel_size", ()) in _EACH[1] else 3)


def first_conv(module: nn.Conv2d, dims: int) -> str | None:
    """A convolution of any window and step, padded by zeros."""
    if _CONVS.get(type(module)) != dims:
        return _kind(module)
    plain = (
        module.dilation in _EACH[1]
        and module.groups == 1
        and not isinstance(module.padding, str)
        and module.padding_mode == "zeros"
    )
    return None if plain else "has other settings"


def averaging(module: nn.AvgPool2d, dims: int) -> str | None:
    """Average pooling of windows that do not overlap."""
    if _AVG_POOLS.get(type(module)) != dims:
        return _kind(module)
    plain = (
        each_axis(module.kernel_size, dims) == each_axis(module.stride, dims)
        and module.padding in _EACH[0]
        and not module.ceil_mode
        and getattr(module, "divisor_override", None) is None
    )
    return None if plain else f"has other settings: {module}"


def max_pool(module: nn.MaxPool2d, dims: int) -> str | None:
    """Maximum pooling of 3x3 windows, with padding 1."""
    if _MAX_POOLS.get(type(module)) != dims:
        return _kind(module)
    plain = (
        module.kernel_size in _EACH[3]
        and module.padding in _EACH[1]
        and module.dilation in _EACH[1]
        and not module.ceil_mode
        and not module.return_indices
    )
    return None if plain else f"has other settings: {module}"


def global_pool(module: nn.AdaptiveAvgPool2d, dims: int) -> str | None:
    """Average over all of space."""
    if _GLOBAL_POOLS.get(type(module)) != dims:
        return _kind(module)
    return None if module.output_size in _EACH[1] else f"has other settings: {module}"


def flatten(module: nn.Flatten, dims: int) -> str | None:
    """All but the batch in one row."""
    if type(module) is not nn.Flatten:
        return _kind(module)
    plain = (module.start_dim, module.end_dim) == (1, -1)
    return None if plain else f"has other settings: {module}"


def dropout(module: nn.Module, dims: int) -> str | None:
    """Dropout of single values or of whole maps."""
    if type(module) is nn.Dropout or _MAP_DROPOUTS.get(type(module)) == dims:
        return None
    return _kind(module)


def read_norm(module: Any) -> Norm:
    """The tensors of a batch norm, and what it would do with them now."""
    tracked = module.track_running_stats or not module.training
    return Norm(
        module.weight,
        module.bias,
        module.running_mean if tracked else None,
        module.running_var if tracked else None,
        module.num_batches_tracked if tracked else None,
        module.momentum,
        module.eps,
        module.training,
    )


def read_conv(module: Any) -> Conv:
    """The tensors of a convolution."""
    return Conv(module.weight, module.bias, each_axis(module.dilation, 1)[0])


def read_first_conv(module: Any, dims: int) -> FirstConv:
    """The tensors of the convolution that reads the images."""
    stride, padding = (each_axis(value, dims) for value in (module.stride, module.padding))
    return FirstConv(module.weight, module.bias, stride, padding)


def read_steps(modules: Mapping[str, Any]) -> tuple[Step, ...]:
    """Norms, convolutions and dropouts in a row, told apart by the first letters of their names."""
    steps: list[Step] = []
    norm = None
    for name, module in modules.items():
        if name.startswith("norm"):
            norm = read_norm(module)
        elif name.startswith("conv") and norm is not None:
            steps.append(Step(norm, read_conv(module)))
        elif name.startswith("drop") and module.training:
            maps = type(module) is not nn.Dropout
            steps[-1] = steps[-1]._replace(drop_rate=float(module.p), drop_maps=maps)
    return tuple(steps)


def each_axis(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """A setting that may be one number for all axes, as one for each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _conv(module: nn.Conv2d, dims: int, size: int) -> str | None:
    if _CONVS.get(type(module)) != dims:
        return _kind(module)
    dilation = each_axis(module.dilation, dims)
    padding = tuple(step * (size // 2) for step in dilation)
    plain = (
        module.kernel_size in _EACH[size]
        and module.stride in _EACH[1]
        and len(set(dilation)) == 1
        and (
            module.padding == "same"
            if isinstance(module.padding, str)
            else each_axis(module.padding, dims) == padding
        )
        and module.groups == 1
        and module.padding_mode == "zeros"
    )
    return None if plain else f"has other settings: {module}"


def _is_own(cls: type, name: str) -> bool:
    """Whether a method comes from the file of the class, or of that of its bases which has it."""
    method: Any = getattr(cls, name)
    if torch.compiler.is_compiling() or _own_methods.get((cls, name)) is method:
        return True
    holder = next(base for base in cls.__mro__ if name in base.__dict__)
    if getattr(method, "__globals__", {}).get("__name__") != holder.__module__:
        return False
    _own_methods[cls, name] = method
    return True


def _kind(module: nn.Module) -> str:
    return f"is of type {type(module).__name__}"
