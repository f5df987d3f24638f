"""From uint8 images to what the network sees: one function for training, evaluation and prediction.

x = (resize(image) / 255 - mean) / std
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densely.data.dataset import ImageSet


def resize(images: Tensor, size: int) -> Tensor:
    """Scale uint8 [N, C, H, W] images to `size` x `size` pixels: uint8 [N, C, size, size].

    Bilinear, smoothed where it shrinks: what Pillow's `Image.resize(..., BILINEAR)` gives, and so
    torchvision's `Resize` of a Pillow image. From 28 to 96 pixels, as in the chapter, it is so to
    the bit on a CPU; for other sizes and on a GPU a pixel may differ by 1 of 255. The whole picture
    is kept; one that is not square is stretched.
    """
    if images.shape[-2:] == (size, size):
        return images
    if images.device.type == "cpu" and size > 1:  # for one pixel PyTorch's uint8 path fails
        return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    scaled = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Preprocessing:
    """Size, channels and scale that a network was trained with; kept beside its weights.

    Args:
        image_size: side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def identity(cls, image_size: int, channels: int) -> "Preprocessing":
        """Pixels in [0, 1], as the chapter has them."""
        return cls(image_size, channels, (0.0,) * channels, (1.0,) * channels)

    @classmethod
    def standardizing(cls, train: ImageSet, image_size: int) -> "Preprocessing":
        """Zero mean and unit variance over all pixels of the training images, per channel."""
        channels = train.images.shape[1]
        means, stds = [], []
        for c in range(channels):
            # A histogram is exact, and needs no float copy of the whole set.
            histogram = torch.bincount(train.images[:, c].flatten(), minlength=256).double()
            values = torch.arange(256, dtype=torch.float64) / 255
            share = histogram / histogram.sum()
            mean = (share * values).sum()
            std = (share * (values - mean) ** 2).sum().sqrt()
            means.append(round(mean.item(), 6))
            stds.append(round(max(std.item(), 1 / 255), 6))  # a constant image has no spread
        return cls(image_size, channels, tuple(means), tuple(stds))

    def __call__(self, images: Tensor) -> Tensor:
        """Turn uint8 [N, C, H, W] into float32 [N, C, image_size, image_size], on the device."""
        scaled = resize(images, self.image_size).float()
        if self.channels == 1:
            return scaled.sub_(255 * self.mean[0]).div_(255 * self.std[0])
        mean = torch.tensor(self.mean, device=images.device).mul_(255).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).mul_(255).view(-1, 1, 1)
        return scaled.sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Build from the values of `to_dict`."""
        made = cls(
            int(values["image_size"]),
            int(values["channels"]),
            tuple(float(v) for v in values["mean"]),
            tuple(float(v) for v in values["std"]),
        )
        if not len(made.mean) == len(made.std) == made.channels or made.image_size < 1:
            raise ValueError(f"preprocessing does not fit together: {made}")
        return made
