"""The named networks: a page of literal numbers, and `build_model`."""

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from densely.errors import ConfigError, unknown_name
from densely.fused import restore
from densely.models.arguments import is_whole
from densely.models.densenet import DenseNet, Stem
from densely.models.fc_densenet import FCDenseNet
from densely.models.init import InitName
from densely.models.parts import Activation, Norm, PoolName
from densely.models.resnet import ResNet

#: Up to this size, in pixels, images get the small stem where a preset leaves the choice open.
SMALL_IMAGE = 64


@dataclass(frozen=True)
class Preset:
    """A named network.

    Args:
        build: makes it; what is not given by name stays as published.
        image_size: side in pixels of the images that it was published for.
        task: what its outputs are.
        stem_by_image_size: whether images of up to SMALL_IMAGE pixels get it with a small stem.
    """

    build: Callable[..., nn.Module]
    image_size: int
    task: Literal["classification", "segmentation"] = "classification"
    stem_by_image_size: bool = False

    @property
    def network(self) -> Callable[..., nn.Module]:
        """The class that `build` makes."""
        return self.build.func if isinstance(self.build, partial) else self.build


def _imagenet(growth_rate: int, block_config: Sequence[int], num_init_features: int) -> Preset:
    """Paper, table 1, for images of 224x224."""
    build = partial(
        DenseNet,
        growth_rate=growth_rate,
        block_config=block_config,
        num_init_features=num_init_features,
    )
    return Preset(build, 224, stem_by_image_size=True)


def _small(
    growth_rate: int,
    block_config: Sequence[int],
    num_init_features: int,
    bn_size: int | None,
    compression: float,
) -> Preset:
    """Paper, section 4.2 and table 2, for images of 32x32: a 3x3 stem and three blocks."""
    build = partial(
        DenseNet,
        growth_rate=growth_rate,
        block_config=block_config,
        num_init_features=num_init_features,
        bn_size=bn_size,
        compression=compression,
        stem="small",
        num_classes=10,
    )
    return Preset(build, 32)


def _tiramisu(growth_rate: int, down: Sequence[int], bottom: int, up: Sequence[int]) -> Preset:
    """Jégou et al., table 2; trained on crops of 224x224."""
    build = partial(
        FCDenseNet,
        growth_rate=growth_rate,
        down_blocks=down,
        bottleneck_layers=bottom,
        up_blocks=up,
    )
    return Preset(build, 224, "segmentation")


_MODELS: dict[str, Preset] = {
    # Dive into Deep Learning, chapter 8.7: plain layers with biases, images of 1x96x96.
    "d2l": Preset(
        partial(
            DenseNet,
            growth_rate=32,
            block_config=(4, 4, 4, 4),
            num_init_features=64,
            bn_size=None,
            compression=0.5,
            stem="large",
            bias=True,
            in_channels=1,
            num_classes=10,
            init="xavier",
        ),
        96,
    ),
    # ... and chapter 8.6, the network that adds.
    "d2l_resnet18": Preset(ResNet, 96),
    "densenet121": _imagenet(32, (6, 12, 24, 16), 64),
    "densenet169": _imagenet(32, (6, 12, 32, 32), 64),
    "densenet201": _imagenet(32, (6, 12, 48, 32), 64),
    "densenet264": _imagenet(32, (6, 12, 64, 48), 64),
    "densenet161": _imagenet(48, (6, 12, 36, 24), 96),
    # Named by depth, L, which counts the layers with weights, and growth rate. Without "C" there
    # is no compression; the stem makes 16 channels, and 2k with BC.
    "densenet_40_12": _small(12, (12, 12, 12), 16, None, 1.0),
    "densenet_100_12": _small(12, (32, 32, 32), 16, None, 1.0),
    "densenet_100_24": _small(24, (32, 32, 32), 16, None, 1.0),
    "densenet_bc_100_12": _small(12, (16, 16, 16), 24, 4, 0.5),
    "densenet_bc_250_24": _small(24, (41, 41, 41), 48, 4, 0.5),
    "densenet_bc_190_40": _small(40, (31, 31, 31), 80, 4, 0.5),
    # Not in the paper: the same design, small enough to learn on a laptop within a minute.
    "densenet_bc_22_12": _small(12, (3, 3, 3), 24, 4, 0.5),
    "fc_densenet56": _tiramisu(12, (4, 4, 4, 4, 4), 4, (4, 4, 4, 4, 4)),
    "fc_densenet67": _tiramisu(16, (5, 5, 5, 5, 5), 5, (5, 5, 5, 5, 5)),
    "fc_densenet103": _tiramisu(16, (4, 5, 7, 10, 12), 15, (12, 10, 7, 5, 4)),
}


class ModelOptions(TypedDict, total=False):
    """What a named network may be changed in: the arguments of `DenseNet`, by their names.

    `FCDenseNet` and `ResNet` take those that they have.
    """

    growth_rate: int
    block_config: Sequence[int]
    num_init_features: int
    bn_size: int | None
    compression: float
    stem: Stem
    bias: bool
    init: InitName
    spatial_dims: int
    strides: Sequence[Sequence[int]] | None
    output_stride: int | None
    norm: Norm
    activation: Activation
    transition_pool: PoolName
    drop_rate: float
    classifier_drop_rate: float
    drop_path_rate: float
    norm_eps: float | None
    fused: bool


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes, those that match a shell pattern such as "*bc*".

    Capital letters are as small ones.
    """
    if not isinstance(pattern, str):
        raise ConfigError(f"pattern={pattern!r}: must be text, such as '*bc*'")
    return fnmatch.filter(_MODELS, pattern.lower())


def preset(name: str) -> Preset:
    """The named network's preset.

    Raises:
        ConfigError: an unknown name; the nearest ones are named.
    """
    if not isinstance(name, str):
        raise ConfigError(f"model={name!r}: must be the name of one, such as 'densenet121'")
    if name not in _MODELS:
        raise ConfigError(unknown_name("model", name, _MODELS))
    return _MODELS[name]


def build_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    **options: Unpack[ModelOptions],
) -> nn.Module:
    """Make a network by its name, with fresh weights.

    Args:
        name: such as "d2l", "densenet121" or "densenet_bc_100_12"; see `list_models()`.
        num_classes: outputs, 0 for the pooled features; None for what it was published with.
        in_channels: channels of the images, 1 for grey; None for what it was published with.
        image_size: side of the images in pixels, if known: up to 64 the ImageNet networks get
            the small stem (3x3, no pooling) unless `stem` says another, and images that would
            shrink to nothing are refused here. Without it they get the published one (7x7/2 and
            pooling).
        options: anything else that `DenseNet` takes.

    Raises:
        ConfigError: an unknown name or option (the nearest ones are named), or a value out of
            range.
    """
    chosen = preset(name)
    given: dict[str, Any] = dict(options)
    takes = list(inspect.signature(chosen.network).parameters)
    if unknown := [
        unknown_name(f"option of {name}", key, takes) for key in given if key not in takes
    ]:
        raise ConfigError("; ".join(unknown))
    if num_classes is not None:
        given["num_classes"] = num_classes
    if in_channels is not None:
        given["in_channels"] = in_channels
    if image_size is not None and not is_whole(image_size):
        raise ConfigError(f"image_size={image_size!r}: must be a whole number, the side of squares")
    if image_size is not None and chosen.stem_by_image_size:
        given.setdefault("stem", "small" if image_size <= SMALL_IMAGE else "large")
    model = chosen.build(**given)
    if image_size is not None and image_size < model.min_image_size:  # type: ignore[operator]
        raise ConfigError(
            f"image_size={image_size}: {name} needs images of at least {model.min_image_size} "
            "pixels; smaller ones would shrink to nothing"
        )
    return model


@dataclass(frozen=True)
class ModelFacts:
    """A line of the table of models.

    Args:
        name: as `create_model` takes it.
        parameters: number of weights.
        macs: multiplications with addition of one image's forward pass, of convolutions and
            linear layers, as densely does them: transitions pool before they convolve.
        input_shape: channels and size of the images that both hold for.
        min_image_size: side of the smallest images, in pixels.
        task: "classification" or "segmentation".
    """

    name: str
    parameters: int
    macs: int
    input_shape: tuple[int, ...]
    min_image_size: int
    task: str


def model_facts(name: str) -> ModelFacts:
    """Count what a named network costs as published, without allocating it.

    Raises:
        ConfigError: an unknown name; the nearest ones are named.
    """
    chosen = preset(name)
    with torch.device("meta"):
        model = chosen.build()
    shape = (int(model.in_channels), chosen.image_size, chosen.image_size)  # type: ignore[arg-type]
    return ModelFacts(
        name,
        sum(p.numel() for p in model.parameters()),
        count_macs(model, torch.empty(1, *shape, device="meta")),
        shape,
        int(model.min_image_size),  # type: ignore[arg-type]
        chosen.task,
    )


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiplications with addition of one image's forward pass.

    Args:
        model: on any device, also "meta", which only counts; it is of no use afterwards.
        image: [1, C, H, W], on the same device.
    """
    restore(model.eval())  # fused steps do not call the modules that they stand for
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        # A weight is used once for each value that it makes; transposed, for each that it reads.
        values = inputs[0] if isinstance(module, _ConvTransposeNd) else output
        macs += values.numel() * module.weight[0].numel()  # type: ignore[index]

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | _ConvNd):
            module.register_forward_hook(count)
        elif isinstance(module, nn.BatchNorm2d | nn.ReLU):
            model.set_submodule(name, nn.Identity())  # they count for nothing
    with torch.no_grad():
        model(image)
    return macs
