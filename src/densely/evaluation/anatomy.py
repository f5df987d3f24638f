"""A network cut open: its parts in the order in which they run, and where its maps can be read.

    image -> stem -> block 1 -> ... -> block B -> norm -> activation -> average -> linear -> logits
                            |                                       |
                         level 1                                 level B

Each part is called as it stands in the network, one after the other. No hook is set: hooks make
densely's fused code step aside.

Known are densely's DenseNet and ResNet, and the DenseNets of torchvision, timm and MONAI, plain or
accelerated, by the names of their classes alone: nothing foreign is imported.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from densely.errors import ConfigError
from densely.fused import parts
from densely.fused.accelerated import original_class
from densely.fused.dialects import known_class
from densely.models.resnet import Residual, ResNet

Part = Callable[[Tensor], Tensor]

_BLOCK, _TRANSITION = re.compile(r"denseblock\d+"), re.compile(r"transition\d+")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a network that ends in a global average and one linear layer.

    Args:
        model: the whole network; it should be in eval mode whenever its parts are run.
        stages: the parts that lead from the image to level 1, from there to level 2, and so on.
        classifier: the linear layer; its outputs are the logits.
        after: what the network makes of the logits, such as a sigmoid.
    """

    model: nn.Module
    stages: tuple[tuple[Part, ...], ...]
    classifier: nn.Linear
    after: tuple[nn.Module, ...] = ()

    @property
    def levels(self) -> int:
        """Number of levels at which maps can be read: one a dense block, or a residual stage."""
        return len(self.stages)

    def maps(self, x: Tensor, level: int) -> Tensor:
        """Maps [N, C, *space] of images [N, channels, *size].

        At the last level they are normalised and activated, as the classifier sees them; at others
        they are the bare output of the block, as `DenseNet.forward_features` gives it.

        Raises:
            ConfigError: there is no such level.
        """
        for stage in self.stages[: self.checked(level)]:
            x = _run(x, stage)
        return x

    def continue_from(self, maps: Tensor, level: int) -> Tensor:
        """Logits [N, K] from the maps of a level.

        Raises:
            ConfigError: there is no such level.
        """
        for stage in self.stages[self.checked(level) :]:
            maps = _run(maps, stage)
        # Dropout before the classifier does nothing in eval mode.
        return self.classifier(maps.mean(dim=tuple(range(2, maps.dim()))))  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """Logits [N, K] of images: both of the above in one."""
        return self.continue_from(self.maps(x, self.levels), self.levels)

    def checked(self, level: int) -> int:
        """The level, if there is such a one.

        Raises:
            ConfigError: there is none.
        """
        if not 1 <= level <= self.levels:
            raise ConfigError(f"level={level}: must be a block from 1 to {self.levels}")
        return level

    def check(self, x: Tensor) -> None:
        """Hold the parts against the whole network, in eval mode.

        Args:
            x: an image or more, [N, channels, *size].

        Raises:
            ConfigError: the network does something else than its parts in turn.
        """
        with torch.no_grad():
            whole = self.model(x)  # first: it says best what is wrong with x
            found = _run(self.logits(x), self.after)
        if not isinstance(whole, Tensor) or not _nearly_equal(found, whole):
            raise ConfigError(
                f"{_name(self.model)}: its outputs are not those of its parts in turn; heat maps "
                "need the package's own forward, without hooks or wrappers that change it"
            )


class Block(NamedTuple):
    """Who reads the channels of a dense block.

    Attributes:
        layers: the first convolution of each layer.
        reader: the convolution of the transition that follows, or the classifier.
    """

    layers: tuple[_ConvNd, ...]
    reader: _ConvNd | nn.Linear


def read(model: nn.Module) -> Anatomy:
    """Cut a network open; nothing is run, and nothing in it changes.

    Raises:
        ConfigError: the network is none of those known, or does not end in a global average and
            one linear layer.
    """
    net: Any = model
    if isinstance(model, ResNet):
        return Anatomy(model, _residual_stages(net.features), *_linear([net.classifier], model))
    known = known_class(original_class(model)) if isinstance(model, nn.Module) else None
    if isinstance(known, str):
        raise _refusal(f"the network {known}")
    package = known.dialect.layer.partition(".")[0] if known else ""
    if known is None or known.kind != "final norm" or package not in _HEADS:
        raise _refusal(f"{_name(model)} given")
    activation, head = _HEADS[package](net)
    return Anatomy(model, _dense_stages(net.features, activation), *_linear(head, model))


def blocks(model: nn.Module) -> list[Block]:
    """Who reads what, a dense block each.

    Raises:
        ConfigError: as `read`, and for a residual network.
    """
    if isinstance(model, ResNet):
        raise ConfigError(
            "a ResNet adds where a DenseNet concatenates: no layer of it reads an earlier one's "
            "channels by weights of their own, so there are no connections to show"
        )
    net: Any = model
    classifier = read(model).classifier
    found: list[Block] = []
    for name, module in net.features._modules.items():
        if _BLOCK.fullmatch(name):
            layers = tuple(_first_convolution(layer) for layer in module.children())
            found.append(Block(layers, classifier))
        elif _TRANSITION.fullmatch(name):
            found[-1] = found[-1]._replace(reader=_first_convolution(module))
    return found


def _dense_stages(features: nn.Module, activation: Iterable[Part]) -> tuple[tuple[Part, ...], ...]:
    stages: list[list[Part]] = [[]]
    children: Any = features._modules.items()  # also one that stands twice
    last = sum(_BLOCK.fullmatch(name) is not None for name, _ in children)
    for name, part in children:
        stages[-1].append(part)
        if _BLOCK.fullmatch(name) and len(stages) < last:
            stages.append([])
    stages[-1].extend(activation)
    return tuple(map(tuple, stages))


def _residual_stages(features: nn.Sequential) -> tuple[tuple[Part, ...], ...]:
    stages: list[list[Part]] = [[]]
    for part in features:
        first: Any = part.conv1 if isinstance(part, Residual) else None
        if first is not None and max(first.stride) > 1:  # the size changes here
            stages.append([])
        stages[-1].append(part)
    return tuple(map(tuple, stages))


#: What follows the last norm: the activation, and all that is called after the global average.
_Head = tuple[tuple[Part, ...], Iterable[nn.Module]]


def _densely(net: Any) -> _Head:
    return (net.activation,), (net.classifier_drop, net.classifier)


def _torchvision(net: Any) -> _Head:
    return (F.relu,), (net.classifier,)


def _timm(net: Any) -> _Head:
    pool: Any = net.global_pool
    average, flatten = getattr(pool, "pool", None), getattr(pool, "flatten", None)
    _require_average(average, flatten, 2, f"{_name(net)} with the pooling {_one_line(pool)}")
    return (), (net.head_drop, net.classifier)  # the activation is within the last norm


def _monai(net: Any) -> _Head:
    head: list[Any] = list(net.class_layers)
    dims = _first_convolution(net.features).weight.dim() - 2
    given = f"{_name(net)} with the head {_one_line(net.class_layers)}"
    average, flatten = (head[1], head[2]) if len(head) > 2 else (None, None)
    _require_average(average, flatten, dims, given)
    return (head[0],), head[3:]


def _require_average(average: Any, flatten: Any, dims: int, given: str) -> None:
    if parts.global_pool(average, dims) or parts.flatten(flatten, dims):
        raise _refusal(f"{given} given")


_HEADS: dict[str, Callable[[Any], _Head]] = {
    "densely": _densely,
    "torchvision": _torchvision,
    "timm": _timm,
    "monai": _monai,
}


def _linear(head: Iterable[nn.Module], model: nn.Module) -> tuple[nn.Linear, tuple[nn.Module, ...]]:
    """The linear layer of a head, and what comes after it."""
    idle = (_DropoutNd, nn.Identity, nn.Flatten)  # they do nothing in eval mode to [N, C]
    steps = [module for module in _leaves(head) if not isinstance(module, idle)]
    if not steps or not isinstance(steps[0], nn.Linear) or any(_learns(m) for m in steps[1:]):
        given = ", ".join(map(_one_line, head)) or "nothing"
        raise _refusal(f"{_name(model)} with the head {given} given")
    return steps[0], tuple(steps[1:])


def _leaves(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential):
            yield from _leaves(module)
        else:
            yield module


def _learns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _first_convolution(module: nn.Module) -> _ConvNd:
    return next(inner for inner in module.modules() if isinstance(inner, _ConvNd))


def _run(x: Tensor, modules: Iterable[Part]) -> Tensor:
    for part in modules:
        x = part(x)
    return x


def _nearly_equal(found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding, which another order of the same sums brings."""
    if found.shape != expected.shape:
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    scale = 1 + expected.abs().nan_to_num(0, 0).max().item()
    return torch.allclose(found, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


def _refusal(given: str) -> ConfigError:
    return ConfigError(
        f"{given}: heat maps need a network that ends in a global average and one linear layer: a "
        "DenseNet of densely, torchvision, timm or MONAI, or densely's ResNet"
    )


def _name(model: object) -> str:
    cls = original_class(model) if isinstance(model, nn.Module) else type(model)
    return parts.qualified_name(cls)


def _one_line(module: nn.Module) -> str:
    return " ".join(str(module).split())
