"""From uint8 images to what the network sees: one function for training, evaluation and prediction.

x = (resize(image) / 255 - mean) / std
"""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from densely.data.dataset import ImageSet
from densely.errors import DataError

Interpolation = Literal["bilinear", "bicubic"]


def resize(
    images: Tensor, size: int | tuple[int, int], interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Scale uint8 [N, C, H, W] images to `size` x `size` (or height x width) pixels: uint8.

    By default bilinear; smoothed where it shrinks: what Pillow's `Image.resize(..., BILINEAR)`
    gives, and so torchvision's `Resize` of a Pillow image. From 28 to 96 pixels, as in the chapter,
    it is so to the bit; for other sizes a pixel may differ by 1 of 255. Every device gives the same
    pixels (but for a GPU that was told to multiply in tf32: within 1 of 255). The whole picture is
    kept; one that is not square is stretched.
    """
    sides = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] == sides:
        return images
    if images.device.type == "cpu" and min(sides) > 1:  # for one pixel its uint8 path fails
        return F.interpolate(images, size=sides, mode=interpolation, antialias=True)
    return _resize_by_products(images, sides, interpolation)


def _resize_by_products(
    images: Tensor, sides: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """The pixels of PyTorch's uint8 code on a CPU, which no GPU has, by two matrix products.

    Rounded in between, as that code and Pillow do.
    """
    vertical, horizontal = (
        _weights(old, new, interpolation, images.device)
        for old, new in zip(images.shape[-2:], sides, strict=True)
    )
    with torch.autocast(images.device.type, enabled=False):  # a user's own may be on
        wide = _to_whole(images.float() @ horizontal.T)
        return _to_whole(vertical @ wide).to(torch.uint8)


def _to_whole(pixels: Tensor) -> Tensor:
    """Round to the nearest of 0 to 255, halves up."""
    return pixels.add_(0.5).floor_().clamp_(0, 255)


@lru_cache(maxsize=64)
def _weights(old: int, new: int, interpolation: Interpolation, device: torch.device) -> Tensor:
    """Share of each old pixel in each new one: float32 [new, old].

    In as many binary places as PyTorch's uint8 code on a CPU has, so that sums of products with
    pixels are exact, and halves are rounded alike.
    """
    lines = torch.eye(old, dtype=torch.float64)[None, None]
    shares = F.interpolate(lines, size=(new, old), mode=interpolation, antialias=True)[0, 0]
    largest = shares.max().item()
    places = max(n for n in range(23) if int(largest * 2**n + 0.5) < 2**15)
    return shares.mul_(2**places).round_().div_(2**places).to(device, torch.float32)


@lru_cache(maxsize=64)  # or each batch would wait for the GPU, to get these numbers there
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).mul_(255).view(-1, 1, 1)


@dataclass(frozen=True)
class Preprocessing:
    """Size, channels and scale that a network was trained with; kept beside its weights.

    Args:
        image_size: side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        crop: share of the shorter side that the square in the middle shows, as weights trained
            with such crops want it; None stretches the whole picture.
        interpolation: how pictures are scaled.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float | None = None
    interpolation: Interpolation = "bilinear"

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

    def fit(self, images: Tensor) -> Tensor:
        """Scale uint8 [N, C, H, W] to [N, C, image_size, image_size], and crop if it is to be."""
        if images.dtype != torch.uint8:
            raise DataError(f"images of {images.dtype}: expected uint8, 0 to 255")
        size, (height, width) = self.image_size, images.shape[-2:]
        if self.crop is None:
            return resize(images, size, self.interpolation)
        # As torchvision has it: the shorter side to a whole number, the longer one cut to one.
        short = max(size, int(size / self.crop))
        sides = (
            (short, int(short * width / height))
            if height <= width
            else (int(short * height / width), short)
        )
        scaled = resize(images, sides, self.interpolation)
        top, left = (round((side - size) / 2) for side in sides)
        return scaled[..., top : top + size, left : left + size]

    def for_channels(self, channels: int) -> "Preprocessing":
        """The same for images of another number of channels: means of mean and deviation."""
        if channels == self.channels:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, channels=channels, mean=(mean,) * channels, std=(std,) * channels)

    def __call__(self, images: Tensor) -> Tensor:
        """Turn uint8 [N, C, H, W] into float32 [N, C, image_size, image_size], on the device."""
        return self.scale(self.fit(images))

    def scale(self, images: Tensor) -> Tensor:
        """Turn uint8 images of the right size, as `fit` gives them, into float32."""
        scaled = images.float()
        if self.channels == 1:
            return scaled.sub_(255 * self.mean[0]).div_(255 * self.std[0])
        mean, std = (_by_channel(values, images.device) for values in (self.mean, self.std))
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
            None if values.get("crop") is None else float(values["crop"]),
            "bicubic" if values.get("interpolation") == "bicubic" else "bilinear",
        )
        if not len(made.mean) == len(made.std) == made.channels or made.image_size < 1:
            raise ValueError(f"preprocessing does not fit together: {made}")
        return made
