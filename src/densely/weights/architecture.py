"""Which DenseNet a set of weights belongs to, read off their shapes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from densely.errors import WeightsError
from densely.models import DenseNet, list_models
from densely.models.densenet import Stem
from densely.models.registry import preset
from densely.weights.dialects import OURS, Kind, Place


@dataclass(frozen=True)
class Architecture:
    """Arguments of `DenseNet` that weights tell of."""

    growth_rate: int
    block_config: tuple[int, ...]
    num_init_features: int
    bn_size: int | None
    compression: float
    stem: Stem
    bias: bool
    in_channels: int
    num_classes: int
    spatial_dims: int

    def build(self) -> DenseNet:
        """Make the network, with fresh weights."""
        return DenseNet(**asdict(self))

    @property
    def name(self) -> str | None:
        """Name of the preset that has these blocks, if there is one."""
        for name in list_models("d*"):
            given = getattr(preset(name).build, "keywords", {})
            if "growth_rate" in given and all(
                given.get(key, default) == getattr(self, key)
                for key, default in (
                    ("growth_rate", 32),
                    ("block_config", None),
                    ("num_init_features", 64),
                    ("bn_size", 4),
                )
            ):
                return name
        return None


def architecture(weights: Mapping[Place, Tensor], where: str) -> Architecture:
    """Read the architecture off weights in PyTorch's layout.

    Args:
        weights: tensors by place; values are not looked at.
        where: what to call them in an error.

    Raises:
        WeightsError: a part is missing, or the shapes fit no DenseNet.
    """
    shapes = {place[:4]: tuple(t.shape) for place, t in weights.items() if place[4] == "weight"}

    def shape(kind: Kind, block: int, layer: int, part: str) -> tuple[int, ...]:
        found = shapes.get((kind, block, layer, part))
        if found is None or len(found) < 2:
            key = OURS.name_of(Place(kind, block, layer, part, "weight"))
            what = "missing" if found is None else "no kernel"
            raise WeightsError(f"{where}: no DenseNet: {key} is {what}")
        return found

    layers_of: dict[int, set[int]] = {}
    for place in weights:
        if place.kind == "layer":
            layers_of.setdefault(place.block, set()).add(place.layer)
    blocks = sorted(layers_of)
    if not blocks or blocks != list(range(1, len(blocks) + 1)):
        raise WeightsError(f"{where}: no DenseNet: its dense blocks are numbered {blocks}")
    config = []
    for b in blocks:
        layers = sorted(layers_of[b])
        if layers != list(range(1, len(layers) + 1)):
            raise WeightsError(f"{where}: no DenseNet: block {b} has the layers {layers}")
        config.append(len(layers))

    stem_conv = shape("stem", 0, 0, "conv0")
    first = shape("layer", 1, 1, "conv1")
    bottleneck = ("layer", 1, 1, "conv2") in shapes
    growth = shape("layer", 1, 1, "conv2")[0] if bottleneck else first[0]
    width = first[1]
    transitions = [shape("transition", b, 0, "conv")[:2] for b in blocks[:-1]]
    deep, norm = ("stem", 0, 0, "conv2") in shapes, ("stem", 0, 0, "norm0") in shapes
    head = shapes.get(("head", 0, 0, "classifier"))
    return Architecture(
        growth_rate=growth,
        block_config=tuple(config),
        num_init_features=width,
        bn_size=max(1, first[0] // growth) if bottleneck and growth else None,
        compression=_compression(transitions),
        stem="deep" if deep else "large" if norm else "small",
        bias=any(p.variable == "bias" and p.part.startswith("conv") for p in weights),
        in_channels=stem_conv[1],
        num_classes=head[0] if head else 0,
        spatial_dims=len(stem_conv) - 2,
    )


def _compression(transitions: Sequence[tuple[int, ...]]) -> float:
    """The share of channels that all transitions keep, [made, read] each: the roundest there is."""
    if not all(made and read for made, read in transitions):
        return 1.0
    least = max((made / read for made, read in transitions), default=1.0)
    finer = (math.ceil(least * scale) / scale for scale in (10.0**n for n in range(1, 8)))
    for share in (0.5, 1.0, *finer):
        if all(int(read * share) == made for made, read in transitions):
            return share
    return min(1.0, least)
