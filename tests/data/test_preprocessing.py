import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from densely.data.dataset import ImageSet
from densely.data.preprocessing import Preprocessing, _resize_by_products, resize
from densely.errors import DataError


def random_images(n: int, c: int, h: int, w: int, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + c + h + w)
    return torch.randint(low, high, (n, c, h, w), dtype=torch.uint8, generator=generator)


def train_set(images: torch.Tensor) -> ImageSet:
    return ImageSet(images, torch.zeros(len(images), dtype=torch.int64), ("all",))


def resized_by_pillow(image: torch.Tensor, size: int) -> torch.Tensor:
    array = image.permute(1, 2, 0).numpy()
    pillow = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    scaled = np.array(pillow.resize((size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(scaled).view(size, size, -1).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (97, 31), (5, 64), (120, 160), (1, 1)])
@pytest.mark.parametrize("size", [1, 7, 16, 28, 96])
def test_resize_is_pillows_within_one_of_255(
    channels: int, height: int, width: int, size: int
) -> None:
    images = random_images(2, channels, height, width)
    scaled = resize(images, size)
    expected = torch.stack([resized_by_pillow(image, size) for image in images])
    assert scaled.dtype == torch.uint8
    assert (scaled.int() - expected.int()).abs().max().item() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (97, 31), (5, 64), (120, 160), (1, 1)])
@pytest.mark.parametrize("sides", [(96, 96), (7, 9), (30, 64)])
def test_the_way_of_gpus_to_resize_is_the_same(
    height: int, width: int, sides: tuple[int, int], interpolation: Any
) -> None:
    images = random_images(30, 2, height, width)
    found, expected = (way(images, sides, interpolation) for way in (_resize_by_products, resize))
    assert found.equal(expected)


def test_the_way_of_gpus_is_the_same_within_autocast() -> None:
    images = random_images(5, 3, 40, 31)
    expected = _resize_by_products(images, (16, 16), "bilinear")
    with torch.autocast("cpu", torch.bfloat16):
        assert _resize_by_products(images, (16, 16), "bilinear").equal(expected)


@pytest.mark.parametrize("size", [28, 96])
def test_resize_of_the_chapter_is_pillows_bit_for_bit(size: int) -> None:
    images = random_images(50, 1, 28, 28)
    expected = torch.stack([resized_by_pillow(image, size) for image in images])
    assert resize(images, size).equal(expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_does_not_depend_on_memory_layout(channels: int) -> None:
    images = random_images(2, channels, 20, 30)
    other = images.contiguous(memory_format=torch.channels_last)
    assert resize(other, 12).equal(resize(images, 12))


def test_resize_leaves_images_that_fit() -> None:
    images = random_images(2, 3, 8, 8)
    assert resize(images, 8).equal(random_images(2, 3, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_gives_pixels_over_255_exactly(channels: int) -> None:
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, channels, 1, 1)
    x = Preprocessing.identity(16, channels)(every_value)
    expected = np.arange(256, dtype=np.float32) / np.float32(255)
    assert x.dtype == torch.float32
    for channel in x[0]:
        np.testing.assert_array_equal(channel.flatten().numpy(), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_standardizing_gives_zero_mean_and_unit_variance_per_channel(channels: int) -> None:
    images = random_images(50, channels, 10, 10, high=90)
    images += (torch.arange(channels, dtype=torch.uint8) * 80).view(1, -1, 1, 1)
    x = Preprocessing.standardizing(train_set(images), 10)(images).double()
    assert x.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (x.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_standardizing_notes_size_and_channels() -> None:
    prep = Preprocessing.standardizing(train_set(random_images(4, 3, 10, 10)), 7)
    assert (prep.image_size, prep.channels) == (7, 3)
    assert prep(random_images(4, 3, 10, 10)).shape == (4, 3, 7, 7)


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_constant_images_become_zero(value: int) -> None:
    images = torch.full((4, 3, 6, 6), value, dtype=torch.uint8)
    x = Preprocessing.standardizing(train_set(images), 6)(images)
    assert x.abs().max() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_formula_holds_per_channel(channels: int) -> None:
    images = random_images(3, channels, 9, 9)
    mean, std = (0.1, 0.5, 0.9)[:channels], (0.2, 0.3, 0.4)[:channels]
    x = Preprocessing(9, channels, mean, std)(images).numpy()
    for c in range(channels):
        expected = (images[:, c].numpy() / 255 - mean[c]) / std[c]
        np.testing.assert_allclose(x[:, c], expected, atol=1e-5)


@pytest.mark.parametrize("size", [6, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_input_stays_as_it_is(channels: int, size: int) -> None:
    images = random_images(2, channels, 6, 6)
    Preprocessing(size, channels, (0.5,) * channels, (0.5,) * channels)(images)
    assert images.equal(random_images(2, channels, 6, 6))


@pytest.mark.parametrize("channels", [1, 3])
def test_values_survive_json(channels: int) -> None:
    prep = Preprocessing.standardizing(train_set(random_images(5, channels, 8, 8)), 16)
    back = Preprocessing.from_dict(json.loads(json.dumps(prep.to_dict())))
    assert back == prep
    assert hash(back) == hash(prep)  # tuples again, not lists


@pytest.mark.parametrize(("crop", "short"), [(0.875, 64), (0.95, 58)])  # of 58.9, cut as by timm
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (401, 300), (224, 224), (90, 61), (56, 56)]
)
def test_crop_is_the_middle_of_the_scaled_picture(
    height: int, width: int, interpolation: Any, crop: float, short: int
) -> None:
    """As torchvision's Resize and CenterCrop of a Pillow image."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = 56
    scale = short / min(height, width)
    sides = [short if s == min(height, width) else int(s * scale) for s in (width, height)]
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    scaled = Image.fromarray(pixels).resize(sides, method[interpolation])
    left, top = (round((side - size) / 2) for side in sides)
    expected = np.asarray(scaled.crop((left, top, left + size, top + size)))
    prep = Preprocessing(size, 3, (0, 0, 0), (1, 1, 1), crop, interpolation)
    fitted = prep.fit(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert fitted.shape == (1, 3, size, size)
    difference = fitted[0].permute(1, 2, 0).int().numpy() - expected.astype(int)
    assert np.abs(difference).max() <= 1


def test_pictures_that_are_no_bytes_are_refused() -> None:
    with pytest.raises(DataError, match="expected uint8"):
        Preprocessing.identity(8, 1)(torch.rand(1, 1, 8, 8))


def test_for_channels_keeps_or_averages() -> None:
    prep = Preprocessing(8, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop=0.9)
    assert prep.for_channels(3) is prep
    grey = prep.for_channels(1)
    assert (grey.channels, grey.crop) == (1, 0.9)
    assert grey.mean == pytest.approx((0.2,))
    assert grey.std == pytest.approx((0.5,))


def test_plain_values_are_read_back() -> None:
    prep = Preprocessing(8, 1, (0.1,), (0.4,), crop=0.9, interpolation="bicubic")
    assert Preprocessing.from_dict(prep.to_dict()) == prep
    older = {"image_size": 8, "channels": 1, "mean": [0.1], "std": [0.4]}
    assert Preprocessing.from_dict(older) == Preprocessing(8, 1, (0.1,), (0.4,))
