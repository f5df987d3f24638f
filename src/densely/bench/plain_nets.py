"""The peers that no package has: the chapter's net and DenseNet-BC as people write them.

Nothing of densely is in here: `torch.cat` after each layer, modules in a row, as in Dive into Deep
Learning, chapter 8.7, and in the PyTorch versions of the authors' code.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class DenseBlock(nn.Module):
    """Each layer reads all features so far; what it makes is appended to them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C + len(layers) * growth_rate, H, W]."""
        for layer in self.layers:
            x = torch.cat((x, layer(x)), dim=1)
        return x


class Checkpointed(nn.Module):
    """Compute a module, and the maps that it reads, again in the backward pass.

    They are concatenated in here, as torchvision's `memory_efficient` has it: kept for each layer,
    they alone would grow with the square of the depth.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Run the module on the maps in a row, keeping no more than these."""
        result: Tensor = checkpoint(self._joined, *maps, use_reentrant=False)
        return result

    def _joined(self, *maps: Tensor) -> Tensor:
        result: Tensor = self.inner(torch.cat(maps, dim=1))
        return result


class CheckpointedBlock(DenseBlock):
    """The same of layers that begin with `Checkpointed`: the maps stay apart until the end."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C + len(layers) * growth_rate, H, W]."""
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps))
        return torch.cat(maps, dim=1)


def bn_relu_conv(
    in_channels: int, out_channels: int, kernel_size: int, bias: bool
) -> nn.Sequential:
    """BN - ReLU - convolution, same size."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias),
    )


def transition(in_channels: int, out_channels: int, bias: bool) -> nn.Sequential:
    """BN - ReLU - Conv1x1 - 2x2 average pooling."""
    return nn.Sequential(
        *bn_relu_conv(in_channels, out_channels, 1, bias), nn.AvgPool2d(kernel_size=2, stride=2)
    )


def chapter_net(checkpointed: bool = False) -> nn.Sequential:
    """The chapter's net for images of 1x96x96; checkpoints are around each cat - layer."""

    def layer(in_channels: int) -> nn.Module:
        inner = bn_relu_conv(in_channels, 32, 3, bias=True)
        return Checkpointed(inner) if checkpointed else inner

    stem = [
        nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    ]
    block = CheckpointedBlock if checkpointed else DenseBlock
    net = _assemble(stem, 64, [4, 4, 4, 4], 32, layer, block, bias=True)

    def xavier(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)

    return net.apply(xavier)


def bc_net(depth: int, growth_rate: int = 12, checkpointed: bool = False) -> nn.Sequential:
    """DenseNet-BC for images of 3x32x32; checkpoints are around each cat - BN - ReLU - Conv1x1.

    Args:
        depth: layers with weights, L = 6n + 4 for three blocks of n bottleneck layers.
        growth_rate: channels that each layer adds.
        checkpointed: compute the wide part of each layer again in the backward pass.
    """

    def layer(in_channels: int) -> nn.Module:
        wide: nn.Module = bn_relu_conv(in_channels, 4 * growth_rate, 1, bias=False)
        if checkpointed:
            wide = Checkpointed(wide)
        return nn.Sequential(wide, bn_relu_conv(4 * growth_rate, growth_rate, 3, bias=False))

    stem = [nn.Conv2d(3, 2 * growth_rate, 3, padding=1, bias=False)]
    blocks = 3 * [(depth - 4) // 6]
    block = CheckpointedBlock if checkpointed else DenseBlock
    net = _assemble(stem, 2 * growth_rate, blocks, growth_rate, layer, block, bias=False)

    def he(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    return net.apply(he)


def _assemble(
    stem: Sequence[nn.Module],
    channels: int,
    blocks: list[int],
    growth_rate: int,
    layer: Callable[[int], nn.Module],
    block: type[DenseBlock],
    bias: bool,
) -> nn.Sequential:
    parts: list[nn.Module] = list(stem)
    for i, num_layers in enumerate(blocks):
        parts.append(block([layer(channels + j * growth_rate) for j in range(num_layers)]))
        channels += num_layers * growth_rate
        if i < len(blocks) - 1:
            parts.append(transition(channels, channels // 2, bias))
            channels //= 2
    parts += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(channels, 10))
