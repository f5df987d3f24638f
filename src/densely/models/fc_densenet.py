"""FC-DenseNet, "Tiramisu": dense blocks on a way down and on a way up, for segmentation.

    stem -> [block -> keep -> down] * 5 -> block -> [up -> join with kept -> block] * 5 -> 1x1

On the way down a block's output joins its input, as in every DenseNet; the joined maps are kept
for the way up. On the way up a transposed convolution takes only the maps that the block before it
made new, or the number of channels would explode.

    transition down   BN - ReLU - 1x1 convolution, all channels kept - dropout - 2x2 MAX pooling
    transition up     3x3 transposed convolution, stride 2

Parameters at 3 channels and 11 classes: 1,376,795 (56), 3,463,243 (67), 9,322,091 (103). The
paper's table 2 prints 1.5, 3.5 and 9.4 million. The last two are what comes out when the running
statistics of the norms are counted as well (3.50 and 9.43 million); for 56 that gives 1.40, and
its 1.5 remains unexplained.

Source: Jégou, Drozdzal, Vazquez, Romero, Bengio, "The One Hundred Layers Tiramisu" (2017),
sections 3 and 4, tables 1 and 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densely.errors import ConfigError
from densely.fused import accelerate
from densely.models.arguments import check_types, of_plain_numbers
from densely.models.densenet import DenseBlock, Transition
from densely.models.init import INITS, InitName, initialize
from densely.models.inputs import check_input
from densely.models.parts import TRANSPOSED_CONVS, Activation, Norm, Parts


class FCDenseNet(nn.Module):
    """Segmentation: [N, in_channels, H, W] to a class for each pixel, [N, num_classes, H, W].

    Args:
        growth_rate: channels that each layer adds.
        down_blocks: layers of each block on the way down.
        bottleneck_layers: layers of the block at the bottom.
        up_blocks: layers of each block on the way up.
        num_init_features: channels that the first convolution makes.
        in_channels: channels of the images.
        num_classes: classes of a pixel; CamVid, the paper's, has 11.
        spatial_dims: 1, 2 or 3.
        drop_rate: dropout after each convolution of blocks and transitions down.
        norm, activation: as `DenseNet`.
        init: how weights start; "torchvision" is He's with the paper's variance, 2 / fan_in, of a
            normal distribution; the paper's is uniform.
        fused: as `DenseNet`.

    Raises:
        ConfigError: an argument is out of range; all faults are named at once.
        ShapeError: (forward) other channels, or images smaller than `min_image_size`.
    """

    @of_plain_numbers
    def __init__(
        self,
        *,
        growth_rate: int = 16,
        down_blocks: Sequence[int] = (4, 5, 7, 10, 12),
        bottleneck_layers: int = 15,
        up_blocks: Sequence[int] = (12, 10, 7, 5, 4),
        num_init_features: int = 48,
        in_channels: int = 3,
        num_classes: int = 11,
        spatial_dims: int = 2,
        drop_rate: float = 0.2,
        norm: Norm = "batch",
        activation: Activation = "relu",
        init: InitName = "torchvision",
        fused: bool = True,
    ) -> None:
        super().__init__()
        check_types(FCDenseNet, locals())
        parts = Parts(spatial_dims, norm, activation, bias=True, drop_rate=drop_rate)
        numbers = {
            "growth_rate": growth_rate,
            "bottleneck_layers": bottleneck_layers,
            "num_init_features": num_init_features,
            "in_channels": in_channels,
            "num_classes": num_classes,
            **{f"down_blocks[{i}]": layers for i, layers in enumerate(down_blocks)},
            **{f"up_blocks[{i}]": layers for i, layers in enumerate(up_blocks)},
        }
        faults = [f"{k}={v}: must be at least 1" for k, v in numbers.items() if v < 1]
        if not down_blocks:
            faults.append("down_blocks is empty: at least one step down is needed")
        if len(down_blocks) != len(up_blocks):
            faults.append(
                f"{len(down_blocks)} down_blocks and {len(up_blocks)} up_blocks: "
                "each step down needs one up"
            )
        if not 0 <= drop_rate < 1:
            faults.append(f"drop_rate={drop_rate}: must be at least 0 and below 1")
        if init not in INITS:
            faults.append(f"init='{init}': must be one of {', '.join(INITS)}")
        if faults := faults + parts.faults():
            raise ConfigError("; ".join(faults))

        self.in_channels, self.num_classes = in_channels, num_classes
        self.spatial_dims = spatial_dims
        self.min_image_size = 2 ** len(down_blocks)

        def block(layers: int, channels: int) -> DenseBlock:
            return DenseBlock(layers, channels, growth_rate, bn_size=None, parts=parts)

        self.conv0 = parts.make_conv(in_channels, num_init_features, 3)
        channels = num_init_features
        self.down, kept = nn.ModuleList(), []
        for layers in down_blocks:
            dense = block(layers, channels)
            channels += layers * growth_rate
            kept.append(channels)
            down = Transition(channels, channels, parts=parts, pool="max")
            self.down.append(nn.ModuleDict({"denseblock": dense, "transition": down}))
        self.bottleneck = block(bottleneck_layers, channels)
        new = bottleneck_layers * growth_rate
        self.up = nn.ModuleList()
        for layers in up_blocks:
            up = TRANSPOSED_CONVS[spatial_dims - 1](new, new, kernel_size=3, stride=2)
            channels = new + kept.pop()
            self.up.append(nn.ModuleDict({"transition": up, "denseblock": block(layers, channels)}))
            new = layers * growth_rate
        self.classifier = parts.make_conv(channels + new, num_classes, 1)
        initialize(self, init)
        if fused:
            accelerate(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each pixel: [N, in_channels, ...] to [N, num_classes, ...] of the same size."""
        check_input(x, self.in_channels, (self.min_image_size,) * self.spatial_dims)
        x = self.conv0(x)
        kept = []
        for step in self.down:
            x = step["denseblock"](x)  # type: ignore[index]
            kept.append(x)
            x = step["transition"](x)  # type: ignore[index]
        new = self.bottleneck(x)[:, x.shape[1] :]
        for step in self.up:
            skip = kept.pop()
            x = torch.cat((crop(step["transition"](new), skip.shape[2:]), skip), dim=1)  # type: ignore[index]
            joined = step["denseblock"](x)  # type: ignore[index]
            new = joined[:, x.shape[1] :]
        return self.classifier(joined)  # type: ignore[no-any-return]


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of [N, C, ...], `size` positions along each axis."""
    for axis, length in enumerate(size, start=2):
        x = x.narrow(axis, (x.shape[axis] - length) // 2, length)
    return x
