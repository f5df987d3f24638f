"""What follows the last norm in each net: ReLU, global average, and the modules after these.

Each function gives the modules that remain to be called once ReLU and average are done, or says
why the two are not what they should be.
"""

from collections.abc import Callable
from itertools import islice

from torch import nn

from densely.fused import parts
from densely.fused.parts import Check, Obstacle, qualified_name

Head = tuple[nn.Module, ...]
ReadHead = Callable[[nn.Module, int], Head | Obstacle]

_TIMM_POOL = "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d"
_TIMM_POOL_PARTS: dict[str, Check] = {"pool": parts.global_pool, "flatten": parts.flatten}
_MONAI_HEAD: dict[str, Check] = {
    "relu": parts.relu,
    "pool": parts.global_pool,
    "flatten": parts.flatten,
}


def torchvision(net: nn.Module, dims: int) -> Head | Obstacle:
    """ReLU and average are functions in the net's forward."""
    return _called(net, "classifier")


def timm(net: nn.Module, dims: int) -> Head | Obstacle:
    """The average is a module of timm's, which has other kinds too; the ReLU is in the norm."""
    pool = net._modules.get("global_pool")
    if pool is None or qualified_name(type(pool)) != _TIMM_POOL:
        return Obstacle(f"is of type {type(pool).__name__}", where="global_pool")
    obstacle = parts.watched(pool) or parts.examine(pool._modules, _TIMM_POOL_PARTS, dims)
    return obstacle.inside("global_pool") if obstacle else _called(net, "head_drop", "classifier")


def monai(net: nn.Module, dims: int) -> Head | Obstacle:
    """All of it is one sequence."""
    head = net._modules.get("class_layers")
    if type(head) is not nn.Sequential:
        return Obstacle(f"is of type {type(head).__name__}", where="class_layers")
    steps = dict(islice(head._modules.items(), len(_MONAI_HEAD)))
    obstacle = parts.watched(head) or parts.examine(steps, _MONAI_HEAD, dims)
    return obstacle.inside("class_layers") if obstacle else tuple(head)[len(steps) :]


def torchxrayvision(net: nn.Module, dims: int) -> Head | Obstacle:
    """Never replaced: this forward also resizes images and rescales outputs."""
    return Obstacle("also resizes images and rescales outputs in its forward")


def densely(net: nn.Module, dims: int) -> Head | Obstacle:
    """The average is a function in the net's forward, before it the ReLU is a module."""
    activation = {"activation": net._modules.get("activation")}
    obstacle = parts.examine(activation, {"activation": parts.relu}, dims)
    return obstacle or _called(net, "classifier_drop", "classifier")


def _called(net: nn.Module, *names: str) -> Head | Obstacle:
    modules = [net._modules.get(name) for name in names]
    missing = [name for name, module in zip(names, modules, strict=True) if module is None]
    return Obstacle("is missing", where=missing[0]) if missing else tuple(filter(None, modules))
