"""Pictures of heat maps: the image stays what it is, colours are where the map is large."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from densely.evaluation.overlay import LARGEST, SMALLEST, overlay, shrunk, stretch, tile


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def panels(picture: Image.Image, image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The image and the overlay, cut out of a picture by looking for the image's first row."""
    array = np.asarray(picture)
    height, width = image.shape[:2]
    alike = np.argwhere((array == image[0, 0]).all(axis=2)).tolist()
    top, left = next(
        (y, x) for y, x in alike if np.array_equal(array[y : y + height, x : x + width], image)
    )
    right = next(  # behind the gap, which is white
        x for x in range(left + width, array.shape[1]) if (array[top : top + height, x] < 250).any()
    )
    return [array[top : top + height, x : x + width] for x in (left, right)]


def rows(pixels: NDArray[np.uint8], factor: int = 1) -> NDArray[np.uint8]:
    planes = np.repeat(pixels, 3, axis=0) if len(pixels) == 1 else pixels
    return planes.transpose(1, 2, 0).repeat(factor, axis=0).repeat(factor, axis=1)


@pytest.mark.parametrize("shape", [(3, 260, 300), (1, 300, 260)])
def test_a_large_image_is_shown_pixel_for_pixel(shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    picture = overlay(pixels, torch.rand(7, 7), title="boot, 0.9", signed=False)
    shown, _ = panels(picture, rows(pixels))
    assert np.array_equal(shown, rows(pixels))
    assert picture.width < 2 * shape[2] + 200
    assert picture.height < shape[1] + 80


@pytest.mark.parametrize(("side", "factor"), [(28, 10), (8, 32), (128, 2), (200, 2)])
def test_a_small_image_is_enlarged_by_a_whole_number(side: int, factor: int) -> None:
    pixels = noise(1, side, side)
    picture = overlay(torch.from_numpy(pixels), torch.rand(3, 3), title="t", signed=True)
    shown, mixed = panels(picture, rows(pixels, factor))
    assert min(shown.shape[:2]) >= SMALLEST
    blocks = mixed.reshape(side, factor, side, factor, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_colours_are_where_the_map_is_large() -> None:
    pixels = np.full((3, 300, 300), 100, np.uint8)
    pixels[0, 0, 0] = 1  # so that it is found in the picture
    heat = torch.zeros(3, 3)
    heat[0, 2], heat[2, 0] = 1.0, -0.5
    _, signed = panels(overlay(pixels, heat, title="", signed=True), rows(pixels))
    red, _, blue = signed.astype(int).transpose(2, 0, 1)
    assert np.unravel_index((red - blue).argmax(), (300, 300))[0] < 60
    assert np.unravel_index((red - blue).argmax(), (300, 300))[1] > 240
    assert np.unravel_index((blue - red).argmax(), (300, 300))[0] > 240
    assert np.unravel_index((blue - red).argmax(), (300, 300))[1] < 60
    assert (signed[:40, :40].std(axis=2) < 1).all()  # grey where the map is zero
    assert (signed[5, 5] == 65).all()
    strong, weak = int((red - blue).max()), int((blue - red).max())
    assert strong > 100
    assert weak > 50
    _, positive = panels(overlay(pixels, heat.relu(), title="", signed=False), rows(pixels))
    red, _, blue = positive.astype(int).transpose(2, 0, 1)
    assert (red - blue)[20, 280] > 50
    assert (red - blue)[280, 20] == 0


def test_brightness_rises_with_the_map() -> None:
    """What is printed in grey, or seen by the colour-blind, can be read as well."""
    pixels = np.full((1, 256, 300), 40, np.uint8)
    pixels[0, 0, 0] = 1
    for signed, start in ((False, 0.0), (True, -1.0)):
        heat = torch.linspace(start, 1, 300).repeat(256, 1)
        _, mixed = panels(overlay(pixels, heat, title="", signed=signed), rows(pixels))
        luma = mixed[100].astype(float) @ [0.299, 0.587, 0.114]
        right = luma[150 if signed else 60 :]
        assert (np.diff(right) > -1.5).all()
        assert right[-1] > right[0] + 80
        if signed:
            assert (np.diff(luma[:150]) < 1.5).all()


def test_what_the_network_did_not_see_is_dark() -> None:
    pixels = np.full((1, 256, 300), 200, np.uint8)
    pixels[0, 0, 0] = 1
    heat = torch.zeros(256, 300)
    heat[:, :50] = torch.nan
    heat[100, 100] = 1
    _, mixed = panels(overlay(pixels, heat, title="", signed=False), rows(pixels))
    assert (mixed[100, :50] == 50).all()
    assert (mixed[100, 60:90] == 130).all()


@pytest.mark.parametrize("signed", [True, False])
def test_a_map_of_zeros_is_drawn(signed: bool) -> None:
    pixels = noise(3, 256, 256)
    _, mixed = panels(overlay(pixels, torch.zeros(2, 2), title="", signed=signed), rows(pixels))
    assert (mixed.max(axis=2) == mixed.min(axis=2)).all()


def test_the_bar_tells_the_values() -> None:
    pixels, heat = noise(3, 256, 256), torch.rand(4, 4)
    one, eight = (
        np.asarray(overlay(pixels, scale * heat, title="t", signed=False)) for scale in (1, 8)
    )
    assert one.shape == eight.shape
    right = 12 + 2 * 256 + 3 * 12
    assert np.array_equal(one[:, :right], eight[:, :right])
    assert not np.array_equal(one[:, right:], eight[:, right:])


@pytest.mark.parametrize(
    "title",
    [
        "",
        "牛仔裤, 0.93: CAM",
        "$x^2$ and \\frac{1}{2} and 50% _a_",
        "$unbalanced",
        "\udcff\udcfe no text",
        "two\nlines",
        "a word " * 60,
        "x" * 400,
        "ブーツ \N{SNOWMAN} مرحبا",
    ],
)
def test_any_title_is_drawn(title: str) -> None:
    pixels = noise(3, 256, 256)
    picture = overlay(pixels, torch.rand(4, 4), title=title, signed=False)
    assert picture.width == overlay(pixels, torch.rand(4, 4), title="t", signed=False).width
    shown, _ = panels(picture, rows(pixels))
    top = np.argwhere((np.asarray(picture) != 255).any(axis=2)).min(axis=0)
    assert (top >= 2).all()
    above = np.asarray(picture)[: picture.height - 256 - 12]
    assert bool((above < 128).any()) == bool(title)
    assert (above[:, -8:] > 250).all()  # it does not run out of the picture
    assert shown.shape == (256, 256, 3)


@pytest.mark.parametrize("shape", [(1, 10, 700), (3, 700, 10), (1, 1, 1)])
def test_images_of_any_shape_are_drawn(shape: tuple[int, ...]) -> None:
    picture = overlay(noise(*shape), torch.rand(3, 3), title="boot, 0.9: CAM", signed=True)
    assert picture.mode == "RGB"
    assert picture.height > 100


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 4000, 3000), (2000, 1500)),
        ((3, 20000, 200), (2000, 20)),
        ((1, 1, 60000), (1, 2000)),
        ((1, 60000, 1), (2000, 1)),
        ((3, 2000, 30), (2000, 30)),
    ],
)
def test_a_very_large_image_is_scaled_down(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    pixels = noise(*shape)
    small = shrunk(pixels, LARGEST)
    assert small.shape == (shape[0], *size)
    picture = overlay(pixels, torch.rand(3, 3), title="boot, 0.9: CAM", signed=True)
    assert max(picture.size) < 2 * LARGEST + 500
    shown, _ = panels(picture, rows(small))
    assert np.array_equal(shown, rows(small))


def test_what_is_scaled_down_stays_where_it_is() -> None:
    pixels = np.zeros((3, 300, 3000), np.uint8)
    pixels[1, 150:, 2250:] = 200
    small = shrunk(pixels, LARGEST).astype(int)
    assert (small[[0, 2]] == 0).all()
    assert (small[1, 105:, 1505:] == 200).all()
    assert (small[1, :95] == 0).all()
    assert (small[1, :, :1495] == 0).all()


def test_text_beside_a_high_and_narrow_image_does_not_dwarf_it() -> None:
    picture = overlay(noise(1, 2000, 30), torch.rand(3, 3), title="boot", signed=True)
    assert picture.size[0] == 300
    assert picture.size[1] < 2100


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 28, 28), (112, 112)),
        ((3, 8, 8), (112, 112)),
        ((3, 96, 96), (96, 96)),
        ((3, 224, 448), (112, 56)),
        ((3, 32, 16), (64, 128)),
    ],
)
def test_tiles_are_small(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    pixels = noise(*shape)
    pair = tile(pixels, torch.rand(3, 3) - 0.5)
    assert pair.size == (2 * size[0] + 2, size[1])
    if shape[1] <= 112:
        left = np.asarray(pair)[:, : size[0]]
        assert np.array_equal(left, rows(pixels, size[1] // shape[1]))
    plain = tile(pixels, torch.ones(3, 3), signed=False)
    assert not np.array_equal(
        np.asarray(plain)[:, size[0] + 2 :], np.asarray(pair)[:, size[0] + 2 :]
    )


def test_maps_are_stretched_bilinearly() -> None:
    heat = torch.tensor([[0.0, 4.0]])
    assert torch.equal(stretch(heat, 1, 2), heat)
    assert stretch(heat, 1, 4).tolist() == [[0.0, 1.0, 3.0, 4.0]]
    ramp = torch.arange(100.0).repeat(100, 1)
    small = stretch(ramp, 10, 10)
    assert small[5, 5].item() == pytest.approx(54.5)


def test_a_map_one_pixel_wide_is_one_pixel_high_turned() -> None:
    ramp = torch.arange(8.0)[:, None].expand(8, 8).contiguous()
    for height in (1, 7, 20):
        assert torch.equal(stretch(ramp, height, 1), stretch(ramp.T, 1, height).T)
    assert stretch(ramp, 7, 1)[-1].item() > 6
