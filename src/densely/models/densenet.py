"""DenseNet, as the paper and the chapter describe it. Read this file first.

A residual network adds, x + f(x); a dense network concatenates, [x, f(x)]. Each layer of a
dense block so reads the features of all layers before it, and adds `growth_rate` new ones:

    x_l = H_l([x_0, x_1, ..., x_{l-1}])        channels read: num_features + l * growth_rate

`H_l` is BN-ReLU-Conv3x3 (plain), or BN-ReLU-Conv1x1-BN-ReLU-Conv3x3 (bottleneck, "B").
Between blocks a transition shrinks the maps: 1x1 convolution to `compression` times the
channels ("C" where that is below 1) and 2x2 AVERAGE pooling.

    stem -> block -> transition -> block -> ... -> block -> BN-ReLU -> global average -> linear

Names of modules, and so the keys of `state_dict`, are torchvision's.

Sources: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks"
(CVPR 2017), section 3 and tables 1 and 2; Dive into Deep Learning, chapter 8.7, "Densely
Connected Networks (DenseNet)".
"""

import warnings
from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from densely.errors import ConfigError, ShapeError
from densely.models.init import INITS, InitName, initialize

Stem = Literal["large", "small"]


def batch_norm(channels: int | None) -> nn.Module:
    """Batch normalisation of `channels` channels; None learns the number from the first input."""
    if channels is not None:
        return nn.BatchNorm2d(channels)
    with warnings.catch_warnings():  # that lazy modules may change is our concern, not the user's
        warnings.simplefilter("ignore", UserWarning)
        return nn.LazyBatchNorm2d()


def conv(
    in_channels: int | None, out_channels: int, kernel_size: int, *, stride: int = 1, bias: bool
) -> nn.Module:
    """Convolution padded to keep the size; `in_channels=None` learns it from the first input."""
    padding = kernel_size // 2
    if in_channels is not None:
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.LazyConv2d(out_channels, kernel_size, stride, padding, bias=bias)


class DenseLayer(nn.Sequential):
    """`H_l`: from all features so far to `growth_rate` new ones.

    Plain (`bn_size=None`):  BN - ReLU - Conv3x3.
    Bottleneck:              BN - ReLU - Conv1x1 to bn_size * growth_rate - BN - ReLU - Conv3x3.

    Args:
        in_channels: channels read; None learns the number from the first input.
        growth_rate: channels made, `k` in the paper.
        bn_size: width of the bottleneck in multiples of `growth_rate`; None for a plain layer.
        bias: whether convolutions have a bias (the chapter's have, the paper's have not).
    """

    def __init__(
        self, in_channels: int | None, growth_rate: int, *, bn_size: int | None, bias: bool
    ) -> None:
        super().__init__()
        self.norm1 = batch_norm(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        if bn_size is None:
            self.conv1 = conv(in_channels, growth_rate, 3, bias=bias)
        else:
            width = bn_size * growth_rate
            self.conv1 = conv(in_channels, width, 1, bias=bias)
            self.norm2 = batch_norm(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = conv(width, growth_rate, 3, bias=bias)


class DenseBlock(nn.ModuleDict):
    """Dense layers that each read everything before them: [N, C, H, W] to [N, C + L*k, H, W].

    Args:
        num_layers: layers, `L`.
        in_channels: channels of the block's input; None learns the number from the first input.
        growth_rate: channels that each layer adds, `k`.
        bn_size: width of the bottleneck in multiples of `growth_rate`; None for plain layers.
        bias: whether convolutions have a bias.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int | None,
        growth_rate: int,
        *,
        bn_size: int | None,
        bias: bool,
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            channels = None if in_channels is None else in_channels + i * growth_rate
            self[f"denselayer{i + 1}"] = DenseLayer(
                channels, growth_rate, bn_size=bn_size, bias=bias
            )

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate input and output of each layer along the channels."""
        for layer in self.values():
            x = torch.cat((x, layer(x)), dim=1)
        return x


class Transition(nn.Sequential):
    """Fewer channels, half the size: BN - ReLU - Conv1x1 - 2x2 average pooling.

    The pooling runs before the convolution here: both are linear, and a 1x1 convolution works
    on each pixel alone, so the function is the same and the convolution has a quarter of the
    pixels to do. Maximum pooling would not commute so.

    Args:
        in_channels: channels of the input; None learns the number from the first input.
        out_channels: channels of the output.
        bias: whether the convolution has a bias.
    """

    def __init__(self, in_channels: int | None, out_channels: int, *, bias: bool) -> None:
        super().__init__()
        self.norm = batch_norm(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)
        self.conv = conv(in_channels, out_channels, 1, bias=bias)


class DenseNet(nn.Module):
    """A densely connected network for images: [N, in_channels, H, W] to [N, num_classes] logits.

    Args:
        growth_rate: channels that each layer adds, `k`.
        block_config: number of layers of each dense block.
        num_init_features: channels that the stem makes.
        bn_size: width of bottlenecks in multiples of `growth_rate`; None for plain layers.
        compression: share of channels that a transition keeps, `theta`, in (0, 1].
        stem: "large", 7x7/2 convolution - BN - ReLU - 3x3/2 max pooling (ImageNet, the chapter);
            "small", one 3x3 convolution (the paper's CIFAR and SVHN nets).
        bias: whether convolutions have a bias (the chapter's have, the paper's have not).
        in_channels: channels of the images: 1 for grey, 3 for colour.
        num_classes: outputs of the classifier.
        init: how weights start: "fan_out" (the authors'), "torchvision" or "xavier" (the chapter).

    Raises:
        ConfigError: an argument is out of range; all faults are named at once.
        ShapeError: (forward) the images have other channels, or are smaller than
            `min_image_size` and would shrink to nothing.
    """

    def __init__(
        self,
        *,
        growth_rate: int = 32,
        block_config: tuple[int, ...] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        compression: float = 0.5,
        stem: Stem = "large",
        bias: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        init: InitName = "fan_out",
    ) -> None:
        super().__init__()
        faults = [
            f"{name}={value}: must be at least 1"
            for name, value in [
                ("growth_rate", growth_rate),
                ("num_init_features", num_init_features),
                ("bn_size", 1 if bn_size is None else bn_size),
                ("in_channels", in_channels),
                ("num_classes", num_classes),
            ]
            if value < 1
        ]
        if not block_config:
            faults.append("block_config is empty: at least one block is needed")
        faults += [
            f"block_config[{i}]={layers}: each block needs at least 1 layer"
            for i, layers in enumerate(block_config)
            if layers < 1
        ]
        if not 0 < compression <= 1:
            faults.append(f"compression={compression}: must be above 0 and at most 1")
        if stem not in ("large", "small"):
            faults.append(f"stem='{stem}': must be 'large' or 'small'")
        if init not in INITS:
            faults.append(f"init='{init}': must be one of {', '.join(INITS)}")
        if faults:
            raise ConfigError("; ".join(faults))

        self.in_channels = in_channels
        self.num_classes = num_classes
        # The large stem divides by 4, rounding up; each transition by 2, rounding down.
        self.min_image_size = 2 ** (len(block_config) - 1)
        if stem == "large":
            self.min_image_size = 4 * self.min_image_size - 3

        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if stem == "large":
            parts["conv0"] = conv(in_channels, num_init_features, 7, stride=2, bias=bias)
            parts["norm0"] = batch_norm(num_init_features)
            parts["relu0"] = nn.ReLU(inplace=True)
            parts["pool0"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            parts["conv0"] = conv(in_channels, num_init_features, 3, bias=bias)

        channels = num_init_features
        for b, num_layers in enumerate(block_config, start=1):
            parts[f"denseblock{b}"] = DenseBlock(
                num_layers, channels, growth_rate, bn_size=bn_size, bias=bias
            )
            channels += num_layers * growth_rate
            if b < len(block_config):
                kept = max(1, int(channels * compression))
                parts[f"transition{b}"] = Transition(channels, kept, bias=bias)
                channels = kept
        parts["norm5"] = batch_norm(channels)

        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(channels, num_classes)
        initialize(self, init)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch: [N, in_channels, H, W] to [N, num_classes]."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(
                f"input of shape {list(x.shape)}: expected [N, {self.in_channels}, H, W]"
            )
        if min(x.shape[2:]) < self.min_image_size:
            raise ShapeError(
                f"images of {x.shape[2]}x{x.shape[3]} pixels would shrink to nothing: "
                f"this model needs at least {self.min_image_size}x{self.min_image_size}"
            )
        maps = torch.relu(self.features(x))
        return self.classifier(maps.mean(dim=(2, 3)))  # type: ignore[no-any-return]
