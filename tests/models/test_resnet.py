"""The chapter's ResNet-18 (section 8.6), written here again, and its size."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import assert_equal, images, randomized, step
from torch import Tensor, nn

from densely.errors import ConfigError, ShapeError
from densely.models import ResNet, build_model

# --- The chapter's code, with numbers in place of lazy channels. ---


class TheirResidual(nn.Module):
    def __init__(
        self, channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        if use_1x1conv:
            self.conv3 = nn.Conv2d(channels, num_channels, kernel_size=1, stride=strides)
        else:
            self.conv3 = None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.conv3:
            x = self.conv3(x)
        y += x
        return F.relu(y)


def their_net(arch: tuple[tuple[int, int], ...], in_channels: int, num_classes: int) -> nn.Module:
    width = arch[0][1]
    net = nn.Sequential(
        nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    for i, (num_residuals, num_channels) in enumerate(arch):
        stage = nn.Sequential()
        for j in range(num_residuals):
            if j == 0 and i != 0:
                stage.append(TheirResidual(width, num_channels, use_1x1conv=True, strides=2))
            else:
                stage.append(TheirResidual(width, num_channels))
            width = num_channels
        net.append(stage)
    return net.extend([nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(width, num_classes)])


def in_our_order(theirs: nn.Module) -> list[str]:
    """Keys of their weights in the order of ours: conv1, bn1, conv2, bn2, conv3."""
    place = {"conv1": 0, "bn1": 1, "conv2": 2, "bn2": 3, "conv3": 4}

    def order(key: str) -> list[int]:
        return [int(part) if part.isdigit() else place.get(part, -1) for part in key.split(".")]

    return sorted(theirs.state_dict(), key=order)  # stable: weight, bias, statistics


@pytest.mark.parametrize(
    ("block_config", "channels", "size"),
    [
        ((2, 2, 2, 2), (4, 6, 8, 10), (40, 47)),
        ((1, 3), (5, 7), (17, 9)),
        ((2,), (3,), (8, 8)),
        ((1, 1), (4, 4), (16, 9)),
    ],
)
def test_chapter(
    block_config: tuple[int, ...], channels: tuple[int, ...], size: tuple[int, int]
) -> None:
    ours = randomized(
        ResNet(block_config=block_config, channels=channels, in_channels=2, num_classes=5)
    )
    theirs = their_net(tuple(zip(block_config, channels, strict=True)), 2, 5).double()
    names = dict(zip(ours.state_dict(), in_our_order(theirs), strict=True))
    theirs.load_state_dict({names[k]: v.clone() for k, v in ours.state_dict().items()})
    names["x"] = "x"
    x = images(3, 2, *size)
    for train in (False, True):
        mine, other = step(ours, x, train), step(theirs, x, train)
        assert_equal(mine[0], other[0])
        for found, wanted in zip(mine[1:], other[1:], strict=True):
            assert_equal({names[key]: value for key, value in found.items()}, dict(wanted))


def test_parameters_of_the_chapter() -> None:
    def conv(inputs: int, outputs: int, size: int) -> int:
        return inputs * outputs * size**2 + outputs

    def residual(inputs: int, outputs: int) -> int:
        norms = 2 * 2 * outputs
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return conv(inputs, outputs, 3) + conv(outputs, outputs, 3) + norms + shortcut

    total = conv(1, 64, 7) + 2 * 64
    total += residual(64, 64) + residual(64, 64)
    total += residual(64, 128) + residual(128, 128)
    total += residual(128, 256) + residual(256, 256)
    total += residual(256, 512) + residual(512, 512)
    total += 512 * 10 + 10
    assert total == 11_178_378
    with torch.device("meta"):
        model = build_model("d2l_resnet18")
    assert sum(p.numel() for p in model.parameters()) == total


def test_feature_maps_are_the_chapters() -> None:
    """The chapter prints them for an image of 96x96."""
    with torch.device("meta"):
        model = build_model("d2l_resnet18")
        x = torch.zeros(1, 1, 96, 96)
        shapes = []
        for part in model.features:
            x = part(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes[3:] == [
        *[(64, 24, 24)] * 3,
        *[(128, 12, 12)] * 2,
        *[(256, 6, 6)] * 2,
        *[(512, 3, 3)] * 2,
    ]


def test_one_pixel_is_enough() -> None:
    model = ResNet(channels=(2, 2, 2, 2)).eval()
    assert model.min_image_size == 1
    assert model(torch.zeros(1, 1, 1, 1)).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 32, 32), (1, 1, 8, 32, 32)])
def test_input_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError) as error:
        ResNet(channels=(2, 2, 2, 2))(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    assert "[N, 1, H, W]" in str(error.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"in_channels": 0, "num_classes": 0, "init": "magic"}, "in_channels num_classes init"),
        ({"block_config": (1, 2)}, "block_config channels"),
        ({"block_config": (1, 2, 0, 1)}, "block_config channels"),
        ({"channels": (1, 2, 3, -4)}, "block_config channels"),
        ({"block_config": (), "channels": ()}, "block_config channels"),
    ],
)
def test_faults_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        ResNet(**options)
    assert all(f"{field}=" in str(error.value) for field in named.split())
