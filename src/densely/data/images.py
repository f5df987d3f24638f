"""Reading one image file that anybody may have made: any mode, any size, nothing trusted."""

import stat
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from densely.errors import DataError

#: Formats that are opened, whatever a file's name says, and the suffixes looked for in folders.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MAX_PIXELS = 89_000_000  # where Pillow begins to warn of decompression bombs

_GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")

#: By EXIF's orientation. Not ImageOps.exif_transpose: that writes the EXIF anew, or fails to.
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: Path) -> Image.Image:
    """Open an image and read its header.

    Raises:
        DataError: there is no such file, it is no image of an allowed format, or too large.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (OSError, ValueError):  # nothing, a broken link, or no name that a file may have
        kind = 0
    if kind == stat.S_IFDIR:
        raise DataError(f"{path} is a folder, an image file was expected")
    if kind != stat.S_IFREG:  # a pipe would never end
        raise DataError(f"there is no image file {path}")
    try:
        image = Image.open(path, formats=FORMATS)
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: at most {MAX_PIXELS:,} pixels are read: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a readable {', '.join(FORMATS)} image") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(
            f"{path}: {image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are read"
        )
    return image


def is_grey(image: Image.Image) -> bool:
    """Whether an opened image has no colour by its mode; its pixels are not looked at."""
    if image.mode == "P":
        palette = image.getpalette("RGB") or []
        return palette[0::3] == palette[1::3] == palette[2::3]
    return image.mode in _GREY_MODES


def is_sixteen_bit(image: Image.Image) -> bool:
    """Whether an opened image is grey with 16 bits a pixel."""
    return image.mode.startswith("I;16")


def decode(image: Image.Image, channels: int, name: str) -> Tensor:
    """Pixels of an opened image, upright, as uint8 [channels, H, W].

    Transparent parts are put on white; 16-bit grey is scaled to 8 bits, not clipped.

    Args:
        image: from `open_image`, or made in memory.
        channels: 1 for grey (ITU-R 601 luma), 3 for RGB.
        name: for messages.

    Raises:
        DataError: the file is truncated or corrupt, or the pixels have no known range (Pillow's
            modes "I" and "F").
        MemoryError: there is too little for so many pixels.
    """
    if image.mode in ("I", "F"):
        raise DataError(f"{name}: Pillow mode '{image.mode}' has no known range; convert it to 'L'")
    try:
        image.load()
        turn = _turn(image)
        eight_bit = _eight_bit(image if turn is None else image.transpose(turn))
        mode = "L" if channels == 1 else "RGB"
        pixels = np.array(eight_bit if eight_bit.mode == mode else eight_bit.convert(mode))
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error):  # Pillow's decoders'
            raise MemoryError(f"{name}: {image.width}x{image.height} pixels") from error
        raise DataError(f"{name}: corrupt image ({error})") from error
    planes = pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(planes)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a loaded image upright; None where it is, or its EXIF cannot be read."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # which one, differs with what is wrong; the pixels are sound
        return None


def _eight_bit(image: Image.Image) -> Image.Image:
    if is_sixteen_bit(image):
        values = np.array(image, dtype=np.int64)
        eight_bit = ((values + 128) // 257).astype(np.uint8)
        if "transparency" in image.info:
            eight_bit[values == image.info["transparency"]] = 255
        return Image.fromarray(eight_bit)
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image.convert("RGBA"))
        return on_white
    return image
