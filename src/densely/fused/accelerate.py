"""`accelerate` and `restore`: densely's code in anybody's DenseNet, in place, and out again."""

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from densely.errors import ConfigError
from densely.fused import parts
from densely.fused.accelerated import Accelerated, original_class
from densely.fused.parts import Obstacle
from densely.fused.report import Acceleration
from densely.fused.swap import swap_in, swap_out
from densely.fused.units import Unit, unit_of


class _Part(NamedTuple):
    """A part of a DenseNet that was found; `reason` says why it cannot be replaced."""

    name: str
    module: nn.Module
    reason: str | None


def accelerate(model: nn.Module) -> Acceleration:
    """Let the DenseNets of torchvision, timm and MONAI within a model run densely's code.

    The model is changed in place, wherever in it they stand: dense blocks, transitions, stem
    and final norm get another forward, which computes the same function. Names, parameters,
    buffers, `state_dict` and hooks stay, and so do optimizers made before. Of TorchXRayVision's
    nets all but the last step is replaced.

    While something stands in the way of a part, like a hook on one of its inner modules, that
    part runs its original forward; the report counts how often, and says why. Copies and pickles
    of an accelerated model are accelerated.

    Args:
        model: any module; it may hold several DenseNets, or none.

    Returns:
        What was replaced, what was left alone and why, and, later on, what ran.

    Raises:
        ConfigError: `model` is no torch.nn.Module.

    Not covered:
        `torch.jit.script` of an accelerated model: `restore` it before.
    """
    already = sum(isinstance(module, Accelerated) for module in _checked(model).modules())
    for part in list(_parts(model)):
        if part.reason is None and not isinstance(part.module, Accelerated):
            swap_in(part.module)
    return _report(model, already)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module has its original class, and nothing else besides.

    Raises:
        ConfigError: `model` is no torch.nn.Module, or others have built a class of theirs upon
            that of an accelerated module, as `fully_shard` does; nothing is restored then.
    """
    accelerated = {
        name: module
        for name, module in _checked(model).named_modules()
        if isinstance(module, Accelerated)
    }
    for name, module in accelerated.items():
        if original_class(module) is type(module):
            raise ConfigError(
                f"{name or 'the model'} cannot be restored: its class became "
                f"{type(module).__name__} after accelerate(); undo that first"
            )
    for module in accelerated.values():
        swap_out(module)


def report(model: nn.Module) -> Acceleration:
    """What of a model is accelerated by now, as after `copy.deepcopy`; changes nothing.

    Raises:
        ConfigError: `model` is no torch.nn.Module.
    """
    return _report(
        model, sum(isinstance(module, Accelerated) for module in _checked(model).modules())
    )


def _report(model: nn.Module, already: int) -> Acceleration:
    replaced: dict[str, list[str]] = {}
    left_alone: dict[str, str] = {}
    for name, module, reason in _parts(model):
        if isinstance(module, Accelerated):
            replaced.setdefault(module._densely_kind, []).append(name)
        else:
            left_alone[name] = reason or "not accelerated yet"
    return Acceleration(replaced, left_alone, already, weakref.ref(model))


def _parts(model: nn.Module) -> Iterator[_Part]:
    whole: list[str] = []  # names of modules whose inside is not looked at
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or not outer for outer in whole):
            continue
        reason = _why_whole(module)
        if reason is not None:
            whole.append(name)
            yield _Part(name, module, reason)
            continue
        unit = unit_of(original_class(module))
        if isinstance(module, Accelerated):
            yield _Part(name, module, None)
        elif isinstance(unit, str):
            yield _Part(name, module, unit)
        elif unit is not None and (unit.kind != "stem" or _holds_blocks(module)):
            yield _Part(name, module, _why_not(module, unit))


def _why_whole(module: nn.Module) -> str | None:
    """Why a module is left alone with all that is in it."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted: its code cannot be replaced"
    return None


def _why_not(module: nn.Module, unit: Unit) -> str | None:
    """Why a part cannot be replaced, whatever passing obstacles there are now."""
    patched = parts.patched(module, ("forward",))
    obstacle = patched or unit.plan(module)
    if isinstance(obstacle, Obstacle) and (obstacle is patched or not obstacle.passing):
        return str(obstacle)
    return None


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a Sequential is the features of a DenseNet, or a piece of them."""
    units = [unit_of(original_class(child)) for child in module.children()]
    return any(isinstance(unit, Unit) and unit.kind == "dense block" for unit in units)


def _checked(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{type(model).__name__} given: a torch.nn.Module is needed, with a DenseNet in it"
        )
    return model
