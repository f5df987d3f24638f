"""The chapter's blocks and net against the chapter's code, written here again."""

import doctest

import pytest
import torch
from torch import Tensor, nn

from densely import chapter, create_model

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _same_weights_each_time() -> None:
    torch.manual_seed(0)


# --- The chapter's code (section 8.7), with numbers in place of lazy channels. ---


def their_conv_block(channels: int, num_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, num_channels, kernel_size=3, padding=1),
    )


class TheirDenseBlock(nn.Module):
    def __init__(self, num_convs: int, channels: int, num_channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *[their_conv_block(channels + i * num_channels, num_channels) for i in range(num_convs)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.net:
            y = block(x)
            x = torch.cat((x, y), dim=1)
        return x


def their_transition_block(channels: int, num_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, num_channels, kernel_size=1),
        nn.AvgPool2d(kernel_size=2, stride=2),
    )


def their_net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    num_channels, growth_rate, arch = 64, 32, (4, 4, 4, 4)
    for i, num_convs in enumerate(arch):
        net.append(TheirDenseBlock(num_convs, num_channels, growth_rate))
        num_channels += num_convs * growth_rate
        if i != len(arch) - 1:
            num_channels //= 2
            net.append(their_transition_block(num_channels * 2, num_channels))
    net.extend([nn.BatchNorm2d(num_channels), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1))])
    return net.extend([nn.Flatten(), nn.Linear(num_channels, 10)])


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """The same outputs and gradients in both modes, from the same random weights."""
    generator = torch.Generator().manual_seed(0)
    ours(x)  # lets lazy layers see their channels
    ours, theirs, x = ours.double(), theirs.double(), x.double()
    tensors = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    for mine, other in tensors:
        if mine.dim() == 1:  # batch norm starts as the identity, which would hide faults
            mine.uniform_(0.5, 1.5, generator=generator)
        other.copy_(mine)
    for train in (False, True):
        y, expected = ours.train(train)(x), theirs.train(train)(x)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    for output in (y, expected):
        (output * weights).sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-8)


# --- The chapter's own tests. ---


def test_shapes() -> None:
    y = chapter.DenseBlock(2, 10)(X)
    assert y.shape == (4, 23, 8, 8)
    assert chapter.transition_block(10)(y).shape == (4, 10, 4, 4)
    assert chapter.conv_block(5)(X).shape == (4, 5, 8, 8)


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_input_channels_are_learnt_from_the_first_input(channels: int) -> None:
    x = torch.zeros(2, channels, 6, 6)
    blocks = [chapter.conv_block(5), chapter.DenseBlock(3, 5), chapter.transition_block(5)]
    for block, out in zip(blocks, (5, channels + 15, 5), strict=True):
        assert block(x).shape[1] == out
        with pytest.raises((RuntimeError, ValueError)):
            block(torch.zeros(2, channels + 1, 6, 6))


def test_dense_block_is_the_concatenation_of_its_conv_blocks() -> None:
    x = X.clone()
    block = chapter.DenseBlock(3, 10)
    y = block(x)
    assert torch.equal(x, X)
    assert torch.equal(y[:, :3], X)
    expected = X
    for conv_block in block.children():
        expected = torch.cat((expected, conv_block(expected)), dim=1)
    assert expected.shape == (4, 33, 8, 8)
    assert torch.equal(y, expected)


def test_blocks_equal_the_chapters() -> None:
    assert_same(chapter.conv_block(5), their_conv_block(3, 5), X)
    assert_same(chapter.DenseBlock(3, 10), TheirDenseBlock(3, 3, 10), X)
    assert_same(chapter.transition_block(10), their_transition_block(3, 10), X[..., :7])


def test_d2l_equals_the_chapters_net() -> None:
    # So many that no norm of the last block divides by the spread of two nearly equal values.
    x = torch.randn(8, 1, 40, 47, generator=torch.Generator().manual_seed(0))
    assert_same(create_model("d2l"), their_net(), x)


def test_d2l_feature_maps_are_the_chapters() -> None:
    model = create_model("d2l").eval()
    shapes = {}
    x = torch.zeros(1, 1, 96, 96)
    assert model(x).shape == (1, 10)
    for name, part in model.features.named_children():
        x = part(x)
        shapes[name] = tuple(x.shape[1:])
    assert {name: shape for name, shape in shapes.items() if name[-2:] != "u0"} == {
        "conv0": (64, 48, 48),
        "norm0": (64, 48, 48),
        "pool0": (64, 24, 24),
        "denseblock1": (192, 24, 24),
        "transition1": (96, 12, 12),
        "denseblock2": (224, 12, 12),
        "transition2": (112, 6, 6),
        "denseblock3": (240, 6, 6),
        "transition3": (120, 3, 3),
        "denseblock4": (248, 3, 3),
        "norm5": (248, 3, 3),
    }


def test_docstring_runs() -> None:
    results = doctest.testmod(chapter)
    assert results.attempted >= 5
    assert results.failed == 0
