"""A module gets densely's forward by a change of its class, and its own back by another.

The new class stands between the module and its original class, so `isinstance`, parameters,
buffers, hooks and names are as before. It is made once for each original class and never pickled:
a pickle holds the original class, and makes the new one again.
"""

import functools
import inspect
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from densely.fused import backend
from densely.fused.accelerated import Accelerated, original_class
from densely.fused.calls import ATTRIBUTE, calls_of, note
from densely.fused.parts import Obstacle, class_patched, everything_watched
from densely.fused.units import Plan, Unit, unit_of

#: Numbers in a unit's input from which on it is worth its preparation, of some 100 us a layer, in
#: inference on a CPU (measurements: docs/log.md). Of images those of the stem's maps.
LEAST = 1 << 20
_STEM_PER_PIXEL = 16
_SMALL = Obstacle("has little to do, which plain PyTorch does sooner", passing=True, expected=True)

_classes: dict[type[nn.Module], type[nn.Module]] = {}


def swap_in(module: nn.Module) -> None:
    """Give a module densely's forward."""
    module.__class__ = accelerated_class(type(module))
    calls_of(module)


def swap_out(module: nn.Module) -> None:
    """Give an accelerated module its own forward back."""
    module.__class__ = original_class(module)
    module.__dict__.pop(ATTRIBUTE, None)


def accelerated_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class that stands in for an original one: the same object each time.

    The original one itself where it is no unit (any more, as may be when an old pickle is read).
    """
    if original not in _classes:
        unit = unit_of(original)
        if not isinstance(unit, Unit):
            return original
        _classes[original] = type(
            f"Accelerated{original.__name__}",
            (Accelerated, original),
            {
                "__module__": original.__module__,
                "__doc__": original.__doc__,
                "_densely_kind": unit.kind,
                "forward": _forward(original, unit),
                "__reduce_ex__": _reduce_ex(original),
            },
        )
    return _classes[original]


def _forward(original: type[nn.Module], unit: Unit) -> Any:
    name = next(islice(inspect.signature(original.forward).parameters, 1, None))

    @functools.wraps(original.forward)  # its signature is what export and fx go by
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else kwargs.get(name)
        plan = _plan(self, unit, x if len(args) + len(kwargs) == 1 else None)
        if isinstance(plan, Obstacle):
            note(self, plan)
            return original.forward(self, *args, **kwargs)
        note(self, None)
        return plan.run(x)

    return forward


def _plan(module: nn.Module, unit: Unit, x: Any) -> Plan | Obstacle:
    if not isinstance(x, Tensor):  # torch.fx sends its proxies
        return Obstacle("was called with something else than one tensor", passing=True)
    if _is_small(x, unit):
        return _SMALL
    obstacle = everything_watched() or class_patched(module, ("forward",))
    if obstacle is not None:
        return obstacle
    plan = unit.plan(module)
    if isinstance(plan, Plan) and x.dim() != plan.dims + 2:
        return Obstacle(f"was called with a tensor of {x.dim()} dimensions", passing=True)
    if isinstance(plan, Plan):
        why = backend.obstacle(x, plan.norms, plan.convs)
        if why is not None:
            return Obstacle(why, passing=True)
    return plan


def _is_small(x: Tensor, unit: Unit) -> bool:
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or tracing:
        return False
    if x.device.type != "cpu":
        return False
    if unit.kind in ("stem", "final norm") and x.dim() > 1:
        return x.numel() // max(1, x.shape[1]) * _STEM_PER_PIXEL < LEAST
    return x.numel() < LEAST


def _reduce_ex(original: type[nn.Module]) -> Any:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if original_class(self) is not original:  # someone made a class of theirs from ours
            return object.__reduce_ex__(self, protocol)
        return _rebuild, (original,), self.__getstate__()

    return __reduce_ex__


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """The first half of copying or unpickling an accelerated module; its state comes after."""
    cls = accelerated_class(original)
    return cls.__new__(cls)
