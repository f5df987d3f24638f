"""Anybody's own images, sorted into folders by class.

    FOLDER/train/CLASS/*.png    with FOLDER/test/CLASS/*.png (or val/ where there is no test/)
    FOLDER/CLASS/*.png          a fifth of each class is set aside for testing

PNG, JPEG, BMP and WebP; grey or colour; any sizes.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from densely.data.dataset import ImageSet, Splits, stratified_split
from densely.data.images import SUFFIXES, decode, is_grey, open_image
from densely.data.parallel import shared_bytes, spread
from densely.data.preprocessing import resize
from densely.errors import DataError

TEST_SHARE = 0.2
#: Side that images are scaled to where the user names none and they are larger or differ in size.
DEFAULT_SIZE = 96


def load_folder(
    folder: Path, image_size: int | None, split_seed: int, channels: int | None = None
) -> Splits:
    """Read a folder of images into memory, scaled to one size.

    Args:
        folder: laid out as the module says.
        image_size: side in pixels; None keeps the size that all images share if it is square and
            at most 96, and scales to 96 otherwise.
        split_seed: of the split into train and test, where the folder has none.
        channels: 1 or 3; None for grey if every image is, and colour otherwise.

    Raises:
        DataError: the layout is wrong, an image is corrupt, or all of them are too many for this
            machine's memory; the file or folder is named.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    parts = {name: folder / name for name in ("train", "test", "val") if (folder / name).is_dir()}
    if "train" in parts and len(parts) == 1:
        raise DataError(f"{folder}: has train/ but neither test/ nor val/")
    if parts and "train" not in parts:
        raise DataError(f"{folder}: has {', '.join(parts)} but no train/")

    files = {name: _labelled_files(part) for name, part in (parts or {"train": folder}).items()}
    classes = tuple(files["train"])
    for name, listing in files.items():
        _check_classes(folder / name if parts else folder, listing, classes, name == "train")

    # Size and channels follow the training images: what is set aside for testing decides nothing.
    deciding = [path for paths in files["train"].values() for path in paths]
    total = sum(len(paths) for listing in files.values() for paths in listing.values())
    reader = _Reader(deciding, total, image_size, channels)
    sets = {name: reader.read(listing, classes) for name, listing in files.items()}
    if not parts:
        train, test = stratified_split(
            sets["train"].labels, classes, TEST_SHARE, split_seed, "test"
        )
        return Splits(folder.name, sets["train"].subset(train), sets["train"].subset(test))
    if "test" in sets:
        return Splits(folder.name, sets["train"], sets["test"], sets.get("val"))
    return Splits(folder.name, sets["train"], sets["val"])


def load_labelled(
    folder: Path, classes: tuple[str, ...], image_size: int, channels: int
) -> ImageSet:
    """Read all of FOLDER/CLASS/*.png as one set, labelled by `classes`; some may be absent.

    Raises:
        DataError: no images, a class that is none of `classes`, or a corrupt image.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    listing = _labelled_files(folder)
    if not any(listing.values()):
        raise DataError(f"{folder}: no class folders with images ({', '.join(SUFFIXES)})")
    if unknown := sorted(set(listing) - set(classes)):
        raise DataError(f"{folder}: classes unknown to the network: {', '.join(unknown)}")
    paths = [path for files in listing.values() for path in files]
    return _Reader(paths, len(paths), image_size, channels).read(listing, classes)


def _labelled_files(part: Path) -> dict[str, list[Path]]:
    """Image files below each class's folder, in a fixed order."""
    listing = {}
    for entry in sorted(part.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            listing[entry.name] = sorted(_image_files(entry))
    return listing


def _image_files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error  # a folder that cannot be read must not be left out without a word

    for top, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(top, name)


def _check_classes(
    part: Path, listing: dict[str, list[Path]], classes: tuple[str, ...], is_train: bool
) -> None:
    layout = "expected FOLDER/train/CLASS/*.png with test/, or FOLDER/CLASS/*.png"
    if not any(listing.values()):
        raise DataError(f"{part}: no class folders with images ({', '.join(SUFFIXES)}); {layout}")
    if len(classes) < 2:
        raise DataError(f"{part}: one class only, '{classes[0]}'; at least 2 are needed; {layout}")
    if unknown := sorted(set(listing) - set(classes)):
        raise DataError(f"{part}: classes without training images: {', '.join(unknown)}")
    if is_train and (empty := [name for name, paths in listing.items() if not paths]):
        raise DataError(f"{part}: class folders without images: {', '.join(empty)}")


class _Reader:
    """Reads files into tensors of one size and number of channels.

    Both follow `paths` where they are None; `total` is the number of files that will be read.
    """

    def __init__(
        self, paths: Sequence[Path], total: int, image_size: int | None, channels: int | None
    ) -> None:
        if channels is None and image_size is not None and not _header(paths[0])[1]:
            channels = 3  # one image of colour decides, and most often the first one does
        if channels is None or image_size is None:
            headers = spread(lambda i: _header(paths[i]), len(paths))
        if channels is None:
            channels = 1 if all(grey for _, grey in headers) else 3
        if image_size is None:
            sizes = {size for size, _ in headers}
            width, height = next(iter(sizes))
            shared = len(sizes) == 1 and width == height <= DEFAULT_SIZE
            image_size = width if shared else DEFAULT_SIZE
        self.channels, self.image_size = channels, image_size

        needed = 2 * total * channels * image_size**2  # twice: splits are copies
        if hasattr(os, "sysconf"):
            installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if needed > 0.7 * installed:
                raise DataError(
                    f"{total:,} images of {image_size}x{image_size} take "
                    f"{needed / 2**30:.1f} GiB, and this machine has {installed / 2**30:.1f} GiB; "
                    "choose a smaller --image-size"
                )

    def read(self, listing: dict[str, list[Path]], classes: tuple[str, ...]) -> ImageSet:
        paths = [path for files in listing.values() for path in files]
        labels = [classes.index(name) for name, files in listing.items() for _ in files]
        images = shared_bytes(len(paths), self.channels, self.image_size, self.image_size)

        def fill(i: int) -> None:
            with open_image(paths[i]) as image:
                pixels = decode(image, self.channels, str(paths[i]))
            images[i : i + 1] = resize(pixels[None], self.image_size)

        spread(fill, len(paths))
        return ImageSet(images, torch.tensor(labels, dtype=torch.int64), classes)


def _header(path: Path) -> tuple[tuple[int, int], bool]:
    """Size and whether it is grey."""
    with open_image(path) as image:
        return image.size, is_grey(image)
