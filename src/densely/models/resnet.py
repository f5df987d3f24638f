"""The ResNet-18 of the same book, which adds where DenseNet concatenates: for comparisons.

    x -> ReLU( BN(Conv3x3(ReLU(BN(Conv3x3(x))))) + x )

Where the size changes, x goes through a 1x1 convolution (with a bias and without a norm, as the
chapter has it; torchvision's has a norm there).

Source: Dive into Deep Learning, chapter 8.6, "Residual Networks (ResNet) and ResNeXt".
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from densely.errors import ConfigError
from densely.models.arguments import check_types, of_plain_numbers
from densely.models.init import INITS, InitName, initialize
from densely.models.inputs import check_input
from densely.models.parts import Parts


class Residual(nn.Module):
    """Two 3x3 convolutions, added to what came in: [N, C, H, W] to [N, channels, H/s, W/s].

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: of the first convolution, `s`; where it is not 1 or the channels change, the
            shortcut is a 1x1 convolution.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        parts = Parts(bias=True)
        self.conv1 = parts.make_conv(in_channels, channels, 3, stride=stride)
        self.norm1 = parts.make_norm(channels)
        self.conv2 = parts.make_conv(channels, channels, 3)
        self.norm2 = parts.make_norm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = parts.make_conv(in_channels, channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum of both ways."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The chapter's residual network: [N, in_channels, H, W] to [N, num_classes] logits.

    Args:
        block_config: residual blocks of each stage; all stages but the first halve the size.
        channels: of each stage.
        in_channels: channels of the images.
        num_classes: outputs of the classifier.
        init: how weights start; the chapter's is "xavier".

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: (forward) the images have other channels.
    """

    @of_plain_numbers
    def __init__(
        self,
        *,
        block_config: Sequence[int] = (2, 2, 2, 2),
        channels: Sequence[int] = (64, 128, 256, 512),
        in_channels: int = 1,
        num_classes: int = 10,
        init: InitName = "xavier",
    ) -> None:
        super().__init__()
        check_types(ResNet, locals())
        faults = [
            f"{name}={value}: must be at least 1"
            for name, value in [("in_channels", in_channels), ("num_classes", num_classes)]
            if value < 1
        ]
        stages = (*block_config, *channels)
        if len(block_config) != len(channels) or not stages or min(stages) < 1:
            faults.append(
                f"block_config={tuple(block_config)}, channels={tuple(channels)}: "
                "must be as many numbers from 1 on, at least one of each"
            )
        if init not in INITS:
            faults.append(f"init='{init}': must be one of {', '.join(INITS)}")
        if faults:
            raise ConfigError("; ".join(faults))
        self.in_channels, self.num_classes = in_channels, num_classes
        self.min_image_size = 1  # all steps are padded: nothing shrinks below one pixel
        parts = Parts(bias=True)
        width = channels[0]
        self.features = nn.Sequential(
            parts.make_conv(in_channels, width, 7, stride=2),
            parts.make_norm(width),
            parts.make_activation(),
            parts.make_max_pool((2, 2)),
        )
        for stage, (blocks, out) in enumerate(zip(block_config, channels, strict=True)):
            for i in range(blocks):
                stride = 2 if i == 0 and stage > 0 else 1
                self.features.append(Residual(width, out, stride=stride))
                width = out
        self.classifier = nn.Linear(width, num_classes)
        initialize(self, init)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch: [N, in_channels, H, W] to [N, num_classes]."""
        if not is_scripting():
            check_input(x, self.in_channels, (self.min_image_size,) * 2)
        return self.classifier(self.features(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]
