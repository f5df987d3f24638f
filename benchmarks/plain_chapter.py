"""The peer: what a learner writes from the chapter in plain PyTorch, with nothing of densely in it.

float32, PyTorch's own layout, a DataLoader whose workers decode and resize image by image with
Pillow (as torchvision's Resize does), SGD. Prints examples/s of the last epoch as JSON: the whole
training pass, loading included.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset


class FashionMNIST(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, folder: Path, count: int, resize: int) -> None:
        with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
            self.images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)[
                :count
            ]
        with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
            self.labels = np.frombuffer(file.read(), np.uint8, offset=8)[:count]
        self.resize = (resize, resize)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self.images[i]).resize(self.resize, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image))[None].float().div(255), int(self.labels[i])


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(in_channels), nn.ReLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
    )


class DenseBlock(nn.Module):
    def __init__(self, num_convs: int, in_channels: int, num_channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(conv_block(in_channels + i * num_channels, num_channels) for i in range(num_convs))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.net:
            x = torch.cat((x, block(x)), dim=1)
        return x


def transition_block(in_channels: int, num_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, num_channels, kernel_size=1),
        nn.AvgPool2d(kernel_size=2, stride=2),
    )


def chapter_net() -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    ]
    channels = 64
    for b in range(4):
        layers.append(DenseBlock(4, channels, 32))
        channels += 4 * 32
        if b < 3:
            layers.append(transition_block(channels, channels // 2))
            channels //= 2
    layers += [
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(channels, 10),
    ]
    net = nn.Sequential(*layers)

    def xavier(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)

    return net.apply(xavier)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the IDX files")
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=4, help="the book's default is 4")
    options = parser.parse_args()

    torch.manual_seed(0)
    net = chapter_net()
    data = FashionMNIST(options.data_dir, options.images, resize=96)
    loader = DataLoader(data, batch_size=256, shuffle=True, num_workers=options.workers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(options.epochs):
        begin, loss_sum, correct = time.perf_counter(), 0.0, 0
        for images, labels in loader:
            optimizer.zero_grad()
            outputs = net(images)
            loss = nn.functional.cross_entropy(outputs, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += float(loss) * len(labels)
            correct += int((outputs.argmax(1) == labels).sum())
        examples_per_s = len(data) / (time.perf_counter() - begin)
    print(json.dumps({"examples_per_s": examples_per_s, "train_accuracy": correct / len(data)}))


if __name__ == "__main__":
    main()
