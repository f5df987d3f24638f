"""DenseNet, as the paper and the chapter describe it. Read this file first.

A residual network adds, x + f(x); a dense network concatenates, [x, f(x)]. Each layer of a
dense block so reads the features of all layers before it, and adds `growth_rate` new ones:

    x_l = H_l([x_0, x_1, ..., x_{l-1}])        channels read: num_features + l * growth_rate

`H_l` is BN-ReLU-Conv3x3 (plain), or BN-ReLU-Conv1x1-BN-ReLU-Conv3x3 (bottleneck, "B").
Between blocks a transition shrinks the maps: 1x1 convolution to `compression` times the
channels ("C" where that is below 1) and 2x2 AVERAGE pooling.

    stem -> block -> transition -> block -> ... -> block -> BN-ReLU -> global average -> linear

The same code makes the whole family: plain and bottleneck layers, large and small images, one to
three dimensions (`Parts`), any strides (`Geometry`). Names of modules, and so the keys of
`state_dict`, are torchvision's.

Sources: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks"
(CVPR 2017), section 3 and tables 1 and 2; Dive into Deep Learning, chapter 8.7, "Densely
Connected Networks (DenseNet)".
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from densely.errors import ConfigError
from densely.fused import accelerate
from densely.models.arguments import check_types, is_whole, of_plain_numbers
from densely.models.geometry import Stride, plan
from densely.models.init import INITS, InitName, initialize
from densely.models.inputs import check_input
from densely.models.parts import POOLS, Activation, DropPath, Norm, Parts, PoolName

Stem = Literal["large", "small", "deep"]
STEMS: tuple[str, ...] = get_args(Stem)
_BATCH_NORM_RELU_2D = Parts()


class DenseLayer(nn.Sequential):
    """`H_l`: from all features so far to `growth_rate` new ones.

    Plain (`bn_size=None`):  BN - ReLU - Conv3x3.
    Bottleneck:              BN - ReLU - Conv1x1 to bn_size * growth_rate - BN - ReLU - Conv3x3.

    Args:
        in_channels: channels read; None learns the number from the first input.
        growth_rate: channels made, `k` in the paper.
        bn_size: width of the bottleneck in multiples of `growth_rate`; None for a plain layer.
        parts: dimensions, norm, activation, bias, and dropout after each convolution.
        dilation: of the 3x3 convolution.
        drop_path_rate: share of images for which the layer adds nothing while training.
    """

    def __init__(
        self,
        in_channels: int | None,
        growth_rate: int,
        *,
        bn_size: int | None,
        parts: Parts = _BATCH_NORM_RELU_2D,
        dilation: int = 1,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = parts.make_norm(in_channels)
        self.relu1 = parts.make_activation()
        if bn_size is None:
            self.conv1 = parts.make_conv(in_channels, growth_rate, 3, dilation=dilation)
        else:
            width = bn_size * growth_rate
            self.conv1 = parts.make_conv(in_channels, width, 1)
            if dropout := parts.make_dropout():
                self.drop1 = dropout
            self.norm2 = parts.make_norm(width)
            self.relu2 = parts.make_activation()
            self.conv2 = parts.make_conv(width, growth_rate, 3, dilation=dilation)
        if dropout := parts.make_dropout():
            self.drop2 = dropout
        if drop_path_rate > 0:
            self.drop_path = DropPath(drop_path_rate)


class DenseBlock(nn.ModuleDict):
    """Dense layers that each read everything before them: [N, C, H, W] to [N, C + L*k, H, W].

    Args:
        num_layers: layers, `L`.
        in_channels: channels of the block's input; None learns the number from the first input.
        growth_rate: channels that each layer adds, `k`.
        bn_size: width of the bottleneck in multiples of `growth_rate`; None for plain layers.
        parts: dimensions, norm, activation, bias, and dropout after each convolution.
        dilation: of the 3x3 convolutions.
        drop_path_rates: of each layer; None for 0.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int | None,
        growth_rate: int,
        *,
        bn_size: int | None,
        parts: Parts = _BATCH_NORM_RELU_2D,
        dilation: int = 1,
        drop_path_rates: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 0:
            raise ConfigError(f"num_layers={num_layers}: must be at least 0")
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                None if in_channels is None else in_channels + i * growth_rate,
                growth_rate,
                bn_size=bn_size,
                parts=parts,
                dilation=dilation,
                drop_path_rate=drop_path_rates[i] if drop_path_rates else 0.0,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate input and output of each layer along the channels."""
        for layer in self.values():
            x = torch.cat((x, layer(x)), dim=1)
        return x


class Transition(nn.Sequential):
    """Fewer channels, half the size: BN - ReLU - Conv1x1 - 2x2 average pooling.

    Average, since a transition hands on what all layers before it have made: a mean keeps a
    trace of every value and gives each a gradient, where a maximum keeps one in four.

    The pooling runs before the convolution here: both are linear, and a 1x1 convolution works
    on each pixel alone, so the function is the same and the convolution has a quarter of the
    pixels to do. Maximum pooling, and dropout between the two, would not commute so: with them
    the order is the paper's.

    Args:
        in_channels: channels of the input; None learns the number from the first input.
        out_channels: channels of the output.
        parts: dimensions, norm, activation, bias, and dropout after the convolution.
        pool: "avg" or "max".
        stride: of the pooling, an axis each; None for 2, and 1 everywhere for no pooling.
    """

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        *,
        parts: Parts = _BATCH_NORM_RELU_2D,
        pool: PoolName = "avg",
        stride: Stride | None = None,
    ) -> None:
        super().__init__()
        stride = stride or (2,) * parts.spatial_dims
        shrinks = max(stride) > 1
        dropout = parts.make_dropout()
        pools_first = pool == "avg" and dropout is None
        self.norm = parts.make_norm(in_channels)
        self.relu = parts.make_activation()
        if shrinks and pools_first:
            self.pool = parts.make_pool(pool, stride)
        self.conv = parts.make_conv(in_channels, out_channels, 1)
        if dropout:
            self.drop = dropout
        if shrinks and not pools_first:
            self.pool = parts.make_pool(pool, stride)


def stem_parts(
    stem: Stem, in_channels: int, width: int, growth_rate: int, strides: Sequence[Stride], p: Parts
) -> "OrderedDict[str, nn.Module]":
    """Modules from the image to `width` channels; see `DenseNet` for the three stems."""
    if stem == "small":
        return OrderedDict(conv0=p.make_conv(in_channels, width, 3))
    if stem == "large":
        parts = OrderedDict(
            conv0=p.make_conv(in_channels, width, 7, stride=strides[0]),
            norm0=p.make_norm(width),
            relu0=p.make_activation(),
        )
    else:
        parts = OrderedDict()
        widths = (in_channels, growth_rate, growth_rate, width)
        for i in range(3):
            stride = strides[0] if i == 0 else 1
            parts[f"conv{i}"] = p.make_conv(widths[i], widths[i + 1], 3, stride=stride)
            parts[f"norm{i}"] = p.make_norm(widths[i + 1])
            parts[f"relu{i}"] = p.make_activation()
    parts["pool0"] = p.make_max_pool(strides[1])
    return parts


class DenseNet(nn.Module):
    """A densely connected network: [N, in_channels, H, W] to [N, num_classes] logits.

    In one or three dimensions [N, in_channels, L] or [N, in_channels, D, H, W].

    Args:
        growth_rate: channels that each layer adds, `k`.
        block_config: number of layers of each dense block.
        num_init_features: channels that the stem makes.
        bn_size: width of bottlenecks in multiples of `growth_rate`; None for plain layers.
        compression: share of channels that a transition keeps, `theta`, in (0, 1].
        stem: "large", 7x7/2 convolution - BN - ReLU - 3x3/2 max pooling (ImageNet, the chapter);
            "small", one 3x3 convolution (the paper's CIFAR and SVHN nets);
            "deep", three 3x3 convolutions, the first /2, in place of the 7x7 (timm's).
        bias: whether convolutions have a bias (the chapter's have, the paper's have not).
        in_channels: channels of the images: 1 for grey, 3 for colour.
        num_classes: outputs of the classifier; 0 for none: the pooled features come out.
        init: how weights start: "fan_out" (the authors'), "torchvision" or "xavier" (the chapter).
        spatial_dims: 1 for signals, 2 for images, 3 for volumes.
        strides: of each step that shrinks, an axis each, the stem's convolution and pooling first,
            then the transitions; None for 2 everywhere. `[(1, 2, 2), (1, 2, 2), (2, 2, 2), ...]`
            suits volumes with thick slices.
        output_stride: shrink no further than this; later blocks are dilated instead.
        norm: "batch", "sync_batch", "group" (32 groups, or as many as divide the channels),
            "layer" (over channels), or a function from channels to a module.
        activation: "relu", "leaky_relu", "elu", "gelu", "silu", "mish", or a function.
        transition_pool: "avg" (the paper's) or "max".
        drop_rate: dropout after each convolution but the first, as the paper has it; torchvision,
            timm and MONAI drop after the last convolution of a layer only.
        classifier_drop_rate: dropout before the classifier (timm's `drop_rate`).
        drop_path_rate: stochastic depth; the rate of the last layer, which earlier ones approach
            linearly from 0.
        norm_eps: epsilon of the norms; None for each one's own (1e-5; Keras has 1.001e-5).
        fused: run stem, dense blocks, transitions and final norm by densely's fused code where it
            covers them: the same function in less memory and time. False for the plain code that
            stands in this file; `densely.accelerate` and `densely.restore` switch later on.

    Attributes:
        feature_channels: channels of each block's output, as `forward_features` gives them.
        feature_strides: their strides against the input, an axis each.
        min_input: smallest input, an axis each; `min_image_size` is the largest of these.

    Raises:
        ConfigError: an argument is out of range; all faults are named at once.
        ShapeError: (forward) the images have other channels, or are smaller than
            `min_input` and would shrink to nothing.
    """

    @of_plain_numbers
    def __init__(
        self,
        *,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        compression: float = 0.5,
        stem: Stem = "large",
        bias: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        init: InitName = "fan_out",
        spatial_dims: int = 2,
        strides: Sequence[Sequence[int]] | None = None,
        output_stride: int | None = None,
        norm: Norm = "batch",
        activation: Activation = "relu",
        transition_pool: PoolName = "avg",
        drop_rate: float = 0.0,
        classifier_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        check_types(DenseNet, locals())
        parts = Parts(spatial_dims, norm, activation, bias, drop_rate)
        faults = [
            f"{name}={value}: must be at least {least}"
            for name, value, least in [
                ("growth_rate", growth_rate, 1),
                ("num_init_features", num_init_features, 1),
                ("bn_size", 1 if bn_size is None else bn_size, 1),
                ("in_channels", in_channels, 1),
                ("num_classes", num_classes, 0),
            ]
            if value < least
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
        faults += [
            f"{name}={value}: must be at least 0 and below 1"
            for name, value in [
                ("drop_rate", drop_rate),
                ("classifier_drop_rate", classifier_drop_rate),
                ("drop_path_rate", drop_path_rate),
            ]
            if not 0 <= value < 1
        ]
        faults += [
            f"{name}='{value}': must be one of {', '.join(known)}"
            for name, value, known in [
                ("stem", stem, STEMS),
                ("init", init, INITS),
                ("transition_pool", transition_pool, POOLS),
            ]
            if value not in known
        ]
        if norm_eps is not None and not 0 < norm_eps < 1:
            faults.append(f"norm_eps={norm_eps}: must be above 0 and below 1")
        faults += parts.faults()
        geometry, wrong = plan(
            spatial_dims,
            max(1, len(block_config)),
            stem_steps=0 if stem == "small" else 2,
            stem_name=stem,
            strides=strides,
            output_stride=output_stride,
        )
        if faults := faults + wrong:
            raise ConfigError("; ".join(faults))

        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = spatial_dims
        self._axes = list(range(2, 2 + spatial_dims))
        self.min_input = geometry.smallest_input
        self.min_image_size = max(self.min_input)
        self.feature_strides = geometry.block_strides

        modules = stem_parts(
            stem, in_channels, num_init_features, growth_rate, geometry.stem, parts
        )
        layers, channels = 0, num_init_features
        feature_channels = []
        for b, num_layers in enumerate(block_config, start=1):
            depths = range(layers + 1, layers + num_layers + 1)
            modules[f"denseblock{b}"] = DenseBlock(
                num_layers,
                channels,
                growth_rate,
                bn_size=bn_size,
                parts=parts,
                dilation=geometry.dilations[b - 1],
                drop_path_rates=[drop_path_rate * depth / sum(block_config) for depth in depths],
            )
            layers += num_layers
            channels += num_layers * growth_rate
            feature_channels.append(channels)
            if b < len(block_config):
                kept = max(1, int(channels * compression))
                modules[f"transition{b}"] = Transition(
                    channels,
                    kept,
                    parts=parts,
                    pool=transition_pool,
                    stride=geometry.transitions[b - 1],
                )
                channels = kept
        modules["norm5"] = parts.make_norm(channels)
        self.feature_channels = tuple(feature_channels)

        self.features = nn.Sequential(modules)
        self.activation = parts.make_activation()
        self.classifier_drop = nn.Dropout(classifier_drop_rate)
        self.classifier = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialize(self, init)
        if norm_eps is not None:
            set_norm_eps(self, float(norm_eps))
        if fused:
            accelerate(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch: [N, in_channels, ...] to [N, num_classes]."""
        self._check(x)
        maps = self.activation(self.features(x))
        pooled = maps.mean(dim=self._axes)
        return self.classifier(self.classifier_drop(pooled))  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor, levels: Sequence[int] | None = None) -> list[Tensor]:
        """Maps of several scales, for heads that detect or segment.

        Args:
            x: [N, in_channels, ...].
            levels: dense blocks, from 1 on, whose output is wanted; None for all of them.

        Returns:
            The blocks' outputs [N, feature_channels[level - 1], ...] in the order of `levels`.
            The last block's comes normalised and activated, as the classifier sees it; the others
            are the bare concatenations, of which each reader takes its own norm.

        Raises:
            ConfigError: there is no such block.
            ShapeError: as `forward`.
        """
        last = len(self.feature_channels)
        wanted = range(1, last + 1) if levels is None else levels
        is_list = isinstance(wanted, Sequence) and len(wanted) > 0
        if not is_list or not all(is_whole(level) and 1 <= level <= last for level in wanted):
            raise ConfigError(f"levels={levels!r}: must be a list of blocks from 1 to {last}")
        self._check(x)
        blocks = {f"denseblock{level}": level for level in range(1, last)}
        maps: dict[int, Tensor] = {}
        for name, part in self.features._modules.items():  # also one that stands twice
            x = part(x)
            if blocks.get(name) in wanted:
                maps[blocks[name]] = x
            if blocks.get(name) == max(wanted):
                break
        else:
            maps[last] = self.activation(x)
        return [maps[level] for level in wanted]

    def _check(self, x: Tensor) -> None:
        if not is_scripting():  # its language has no such tuples
            check_input(x, self.in_channels, self.min_input)


def norm_eps(model: nn.Module) -> set[float]:
    """The epsilons of all norms in `model`: one, as a rule."""
    values = (getattr(module, "eps", None) for module in model.modules())
    return {value for value in values if isinstance(value, float)}


def set_norm_eps(model: nn.Module, eps: float) -> None:
    """Set the epsilon of every norm in `model`, in place."""
    for module in model.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = eps  # type: ignore[assignment]
