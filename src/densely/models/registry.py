"""The named networks: a page of literal numbers, and `create_model`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from densely.errors import ConfigError, unknown_name
from densely.models.densenet import DenseNet

#: Up to this size, in pixels, images get the small stem where a preset leaves the choice open.
SMALL_IMAGE = 64

# Paper, section 4.2 and table 2: on 32x32 images three blocks of equal length, a 3x3 stem of 16
# channels (2k for BC), no compression without "C". L counts the layers with weights.
_plain = partial(
    DenseNet, num_init_features=16, bn_size=None, compression=1.0, stem="small", num_classes=10
)
_bc = partial(DenseNet, bn_size=4, compression=0.5, stem="small", num_classes=10)

_MODELS: dict[str, Callable[..., DenseNet]] = {
    # Dive into Deep Learning, chapter 8.7: plain layers with biases, images of 1x96x96.
    "d2l": partial(
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
    # Paper, table 1, for images of 224x224.
    "densenet121": partial(DenseNet, growth_rate=32, block_config=(6, 12, 24, 16)),
    "densenet169": partial(DenseNet, growth_rate=32, block_config=(6, 12, 32, 32)),
    "densenet201": partial(DenseNet, growth_rate=32, block_config=(6, 12, 48, 32)),
    "densenet264": partial(DenseNet, growth_rate=32, block_config=(6, 12, 64, 48)),
    "densenet161": partial(
        DenseNet, growth_rate=48, block_config=(6, 12, 36, 24), num_init_features=96
    ),
    # Paper, table 2, named by depth and growth rate.
    "densenet_40_12": partial(_plain, growth_rate=12, block_config=(12, 12, 12)),
    "densenet_100_12": partial(_plain, growth_rate=12, block_config=(32, 32, 32)),
    "densenet_100_24": partial(_plain, growth_rate=24, block_config=(32, 32, 32)),
    "densenet_bc_100_12": partial(
        _bc, growth_rate=12, block_config=(16, 16, 16), num_init_features=24
    ),
    "densenet_bc_250_24": partial(
        _bc, growth_rate=24, block_config=(41, 41, 41), num_init_features=48
    ),
    "densenet_bc_190_40": partial(
        _bc, growth_rate=40, block_config=(31, 31, 31), num_init_features=80
    ),
    # Not in the paper: the same design, small enough to learn on a laptop within a minute.
    "densenet_bc_22_12": partial(_bc, growth_rate=12, block_config=(3, 3, 3), num_init_features=24),
}

#: Presets whose stem follows the size of the images; the others are what they are.
_STEM_BY_IMAGE_SIZE = {f"densenet{depth}" for depth in (121, 161, 169, 201, 264)}


def model_names() -> list[str]:
    """Names that `create_model` takes."""
    return list(_MODELS)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
) -> DenseNet:
    """Make a network by its name, with fresh weights.

    Args:
        name: such as "d2l", "densenet121" or "densenet_bc_100_12"; see `model_names()`.
        num_classes: outputs; None for what the network was published with.
        in_channels: channels of the images, 1 for grey; None for what it was published with.
        image_size: side of the images in pixels, if known: up to 64 the ImageNet networks get
            the small stem (3x3, no pooling), and images that would shrink to nothing are refused
            here. Without it they get the published one (7x7/2 and pooling).

    Raises:
        ConfigError: an unknown name (the nearest ones are named), or a value out of range.
    """
    if name not in _MODELS:
        raise ConfigError(unknown_name("model", name, _MODELS))
    options: dict[str, Any] = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if in_channels is not None:
        options["in_channels"] = in_channels
    if image_size is not None and name in _STEM_BY_IMAGE_SIZE:
        options["stem"] = "small" if image_size <= SMALL_IMAGE else "large"
    model = _MODELS[name](**options)
    if image_size is not None and image_size < model.min_image_size:
        raise ConfigError(
            f"image_size={image_size}: {name} needs images of at least {model.min_image_size} "
            "pixels; smaller ones would shrink to nothing"
        )
    return model
