import io
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from densely.data import images
from densely.data.images import decode, is_grey, open_image
from densely.errors import DataError

GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)
ALPHA = np.where(np.arange(6) < 3, 255, 0).astype(np.uint8).repeat(4).reshape(6, 4).T
WHITE = np.full(3, 255, dtype=np.uint8)


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, not rounded."""
    return rgb @ np.array([0.299, 0.587, 0.114])


def read(path: Path, channels: int) -> np.ndarray:
    """Pixels as [H, W, channels]."""
    with open_image(path) as image:
        pixels = decode(image, channels, str(path))
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert pixels.shape[0] == channels
    return pixels.permute(1, 2, 0).numpy()


def palette_image(transparent: int | None = None, *, colour: bool = True) -> Image.Image:
    """Index i has the shade i, or its colour, `transparent` is one of the indices."""
    image = Image.fromarray(GREY).convert("P")
    shades = np.arange(256)[:, None] * np.ones(3, dtype=int)
    image.putpalette(((255 - shades if colour else shades) * (1, 1, not colour)).flatten().tolist())
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def assert_reads_as(path: Path, rgb: np.ndarray, tolerance: float = 0) -> None:
    difference = read(path, 3).astype(float) - rgb
    assert np.abs(difference).max() <= tolerance
    difference = read(path, 1)[:, :, 0].astype(float) - luma(rgb)
    assert np.abs(difference).max() <= tolerance + 0.51  # rounded


def assert_refused(path: Path, *words: str) -> None:
    """Refused when it is opened, or at the latest when its pixels are read."""
    with pytest.raises(DataError) as caught, open_image(path) as image:
        decode(image, 3, str(path))
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_colour_is_read_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(COLOUR).save(path, lossless=True)
    assert_reads_as(path, COLOUR)


def test_grey_keeps_its_values_in_either_number_of_channels(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "l.png")
    assert np.array_equal(read(tmp_path / "l.png", 1)[:, :, 0], GREY)
    assert np.array_equal(read(tmp_path / "l.png", 3), GREY[:, :, None].repeat(3, axis=2))


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    bits = GREY > 100
    Image.fromarray(bits).save(tmp_path / "1.png")
    assert_reads_as(tmp_path / "1.png", bits[:, :, None] * WHITE)


def test_palette_colours_are_looked_up(tmp_path: Path) -> None:
    palette_image().save(tmp_path / "p.png")
    inverse = 255 - GREY
    assert_reads_as(tmp_path / "p.png", np.stack([inverse, inverse, 0 * GREY], axis=2))


def test_transparent_palette_colour_becomes_white(tmp_path: Path) -> None:
    palette_image(transparent=50).save(tmp_path / "p.png")
    inverse = 255 - GREY
    expected = np.stack([inverse, inverse, 0 * GREY], axis=2)
    expected[GREY == 50] = 255
    assert_reads_as(tmp_path / "p.png", expected)


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([COLOUR, ALPHA])).save(tmp_path / "rgba.png")
    assert_reads_as(tmp_path / "rgba.png", np.where(ALPHA[:, :, None] == 255, COLOUR, WHITE))


def test_transparent_grey_becomes_white(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([GREY, ALPHA])).save(tmp_path / "la.png")
    expected = np.where(ALPHA == 255, GREY, 255)[:, :, None].repeat(3, axis=2)
    assert_reads_as(tmp_path / "la.png", expected)


def test_half_transparent_parts_are_mixed_with_white(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([COLOUR, np.full_like(GREY, 51)])).save(tmp_path / "rgba.png")
    assert_reads_as(tmp_path / "rgba.png", 0.2 * COLOUR + 0.8 * 255, tolerance=1)


@pytest.mark.parametrize(
    ("pixels", "transparent"),
    [
        pytest.param(GREY, 50, id="8-bit"),
        pytest.param(GREY.astype(np.uint16) * 257, 50 * 257, id="16-bit"),
    ],
)
def test_grey_value_declared_transparent_becomes_white(
    tmp_path: Path, pixels: np.ndarray, transparent: int
) -> None:
    Image.fromarray(pixels).save(tmp_path / "l.png", transparency=transparent)
    expected = np.where(GREY == 50, 255, GREY)[:, :, None].repeat(3, axis=2)
    assert_reads_as(tmp_path / "l.png", expected)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / "i16.png")
    scaled = (values / 257)[:, :, None].repeat(3, axis=2)
    assert_reads_as(tmp_path / "i16.png", scaled, tolerance=0.51)


def test_cmyk_jpeg_is_read_in_its_colours(tmp_path: Path) -> None:
    flat = Image.new("CMYK", (16, 8), (0, 255, 255, 0))
    flat.save(tmp_path / "cmyk.jpg", quality=95)
    assert_reads_as(tmp_path / "cmyk.jpg", np.tile([255, 0, 0], (8, 16, 1)), tolerance=4)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 1), (8, -1)])
def test_rotated_jpeg_is_turned_upright(tmp_path: Path, orientation: int, turns: int) -> None:
    upright = np.kron([[0, 80], [160, 255], [40, 200]], np.ones((16, 16))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # A camera that was turned stores the picture turned the other way.
    Image.fromarray(np.rot90(upright, turns)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    assert_reads_as(tmp_path / "photo.jpg", upright[:, :, None].repeat(3, axis=2), tolerance=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOUR).save(tmp_path / "image.png", exif=exif)
    with Image.open(tmp_path / "image.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert_reads_as(tmp_path / "image.png", upright)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(b"GARBAGEGARBAGE", id="garbage"),
        pytest.param(b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0\0\0\x01abcd\0\0\0\0", id="no number"),
    ],
)
def test_an_image_whose_exif_cannot_be_read_is_upright(
    tmp_path: Path, suffix: str, exif: bytes
) -> None:
    path = tmp_path / f"image{suffix}"
    flat = np.full_like(COLOUR, 120)
    Image.fromarray(flat).save(path, exif=b"Exif\0\0" + exif, lossless=True)
    assert_reads_as(path, flat, tolerance=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (301, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_is_read(tmp_path: Path, size: tuple[int, int], channels: int) -> None:
    Image.new("RGB", size, (7, 7, 7)).save(tmp_path / "image.png")
    assert np.array_equal(
        read(tmp_path / "image.png", channels), np.full((size[1], size[0], channels), 7)
    )


def test_only_modes_and_palettes_without_colour_are_grey() -> None:
    for mode in ("1", "L", "LA", "I;16"):
        assert is_grey(Image.new(mode, (2, 2)))
    for mode in ("RGB", "RGBA", "CMYK"):
        assert not is_grey(Image.new(mode, (2, 2)))
    assert is_grey(palette_image(colour=False))
    assert not is_grey(palette_image())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_image_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"image{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_refused(path)


def test_corrupt_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(COLOUR).save(path)
    content = path.read_bytes()
    start = content.index(b"IDAT") + 4
    path.write_bytes(content[:start] + bytes(20) + content[start + 20 :])
    assert_refused(path, "corrupt")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError("out of memory error when reading image file")], ids=repr
)
def test_too_little_memory_is_no_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(_: Image.Image) -> None:
        raise error

    Image.fromarray(COLOUR).save(tmp_path / "image.png")
    with open_image(tmp_path / "image.png") as image:
        monkeypatch.setattr(type(image), "load", full)
        with pytest.raises(MemoryError, match=r"image\.png: 6x4 pixels"):
            decode(image, 3, "image.png")


def test_too_little_memory_to_open_an_image_is_no_fault_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    Image.fromarray(COLOUR).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        open_image(tmp_path / "image.png")


@pytest.mark.parametrize("content", [b"", b"I am a picture, honestly.\n", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert_refused(path)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PPM"])
def test_format_that_is_not_allowed_is_refused_whatever_its_name(tmp_path: Path, kind: str) -> None:
    packed = io.BytesIO()
    Image.fromarray(COLOUR).save(packed, format=kind)
    (tmp_path / "image.png").write_bytes(packed.getvalue())
    assert_refused(tmp_path / "image.png", "PNG")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere.png", "no image file")


def test_what_is_no_plain_file_is_refused() -> None:
    with pytest.raises(DataError, match="there is no image file /dev/null"):
        open_image(Path("/dev/null"))


def test_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert_refused(tmp_path / "folder.png", "folder")


def test_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "image.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 24)
    assert read(tmp_path / "image.png", 3).shape == (4, 6, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 23)
    assert_refused(tmp_path / "image.png", "6x4", "23")


def test_more_than_pillow_opens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # it raises above twice as many
    Image.fromarray(COLOUR).save(tmp_path / "image.png")
    assert_refused(tmp_path / "image.png")


def test_reading_in_threads_leaves_the_warning_filters_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "image.png")
    before = list(warnings.filters)
    first_inside, second_inside, first_done = (threading.Event() for _ in range(3))
    real_open = Image.open

    def overlapping(*args: object, **kwargs: object) -> Image.Image:
        """Let the first thread in first, and out while the second is inside."""
        if threading.current_thread() is first:
            first_inside.set()
            second_inside.wait(timeout=1)
        else:
            second_inside.set()
            first_done.wait(timeout=1)
        return real_open(*args, **kwargs)

    monkeypatch.setattr(Image, "open", overlapping)
    first, second = (
        threading.Thread(target=lambda: open_image(tmp_path / "image.png").close())
        for _ in range(2)
    )
    first.start()
    first_inside.wait(timeout=1)
    second.start()
    first.join()
    first_done.set()
    second.join()
    assert list(warnings.filters) == before
