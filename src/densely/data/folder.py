"""Anybody's own images, sorted into folders by class, as `densely.data.layout` says.

PNG, JPEG, BMP and WebP; grey or colour; any sizes. Where there are no splits, a fifth of each class
is set aside for testing.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from densely.data.dataset import ImageSet, Splits, stratified_split
from densely.data.images import SUFFIXES, decode, is_grey, is_sixteen_bit, open_image
from densely.data.layout import EXPECTED, Part, find_parts, left_out_notes, list_part, unread_note
from densely.data.parallel import shared_bytes, spread
from densely.data.preprocessing import resize
from densely.errors import DataError
from densely.words import counted, listed

TEST_SHARE = 0.2
#: Side that images are scaled to where the user names none and they are larger or differ in size.
DEFAULT_SIZE = 96
MOST_NAMED = 5  # of images that cannot be read

R = TypeVar("R")


def load_folder(
    folder: Path, image_size: int | None, split_seed: int, channels: int | None = None
) -> Splits:
    """Read a folder of images into memory, scaled to one size.

    Args:
        folder: laid out as `densely.data.layout` says.
        image_size: side in pixels; None keeps the size that all images share if it is square and
            at most 96, and scales to 96 otherwise.
        split_seed: of the split into train and test, where the folder has none.
        channels: 1 or 3; None for grey if every image is, and colour otherwise.

    Returns:
        The splits; val/ is for testing where there is no test/. Their
        notes tell of that, of files left out, and of what the images lack.

    Raises:
        DataError: the layout is wrong, an image is corrupt, or all of them are too many for this
            machine's memory; the file or folder is named.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    parts = find_parts(folder)
    classes = tuple(parts["train"].files)
    for name, part in parts.items():
        _check_classes(part, classes, name == "train")
    notes = left_out_notes(parts.values()) + unread_note(folder, parts.values())
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
        notes += (f"there is no test folder: {parts['test'].path.name}/ is the test split",)

    # Size and channels follow the training images: what is set aside for testing decides nothing.
    total = sum(len(part.images) for part in parts.values())
    reader = _Reader(parts["train"].images, total, image_size, channels)
    found = {name: reader.read(part, classes, folder) for name, part in parts.items()}
    sets = {name: images for name, (images, _) in found.items()}
    sizes = {origin.size for _, origins in found.values() for origin in origins}
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    notes += _depth_note(found["train"][1])
    if "test" in parts:
        notes += _unjudged_note(parts["test"], classes)
    else:
        whole = sets["train"]
        train, test = stratified_split(whole.labels, classes, TEST_SHARE, split_seed, "test", notes)
        sets = {"train": whole.subset(train), "test": whole.subset(test)}
    notes += _repeated_notes(sets)
    return Splits(
        folder.name,
        sets["train"],
        sets["test"],
        sets.get("val"),
        notes=notes,
        original_sizes=(by_area[0], by_area[-1]),
    )


def load_labelled(
    folder: Path, classes: tuple[str, ...], image_size: int, channels: int
) -> ImageSet:
    """Read all of FOLDER/CLASS/*.png as one set, labelled by `classes`; some may be absent.

    Raises:
        DataError: no images, a class that is none of `classes`, or a corrupt image.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    part = list_part(folder)
    if not part.images:
        raise part.error(f"no class folders with images ({', '.join(SUFFIXES)})")
    if unknown := sorted(set(part.files) - set(classes)):
        raise part.error(
            f"classes unknown to the network: {', '.join(unknown)}; it knows {listed(classes)}"
        )
    reader = _Reader(part.images, len(part.images), image_size, channels)
    images, _ = reader.read(part, classes, folder)
    return images


def _check_classes(part: Part, classes: tuple[str, ...], is_train: bool) -> None:
    if not part.images:
        raise part.error(f"no class folders with images ({', '.join(SUFFIXES)}); {EXPECTED}")
    if len(classes) < 2:
        raise part.error(f"one class only, '{classes[0]}'; at least 2 are needed; {EXPECTED}")
    if unknown := sorted(set(part.files) - set(classes)):
        raise part.error(f"classes without training images: {', '.join(unknown)}")
    if is_train and (empty := [name for name, paths in part.files.items() if not paths]):
        raise part.error(f"class folders without images: {', '.join(empty)}")


def _unjudged_note(test: Part, classes: tuple[str, ...]) -> tuple[str, ...]:
    """A note where the test split lacks a class."""
    missing = [name for name in classes if not test.files.get(name)]
    if not missing:
        return ()
    return (f"classes without test images, which cannot be judged: {', '.join(missing)}",)


def _repeated_notes(sets: Mapping[str, ImageSet]) -> tuple[str, ...]:
    """Notes where a split that judges has images that are learnt from."""
    learnt = set(sets["train"].digests())
    notes = []
    for name, words in (("val", "validation"), ("test", "test")):
        if name in sets:
            again = sets[name].count_among(learnt)
            if again:
                notes.append(
                    f"of {counted(len(sets[name]), f'{words} image')} {again:,} "
                    f"{'is' if again == 1 else 'are'} among the training images too: what is "
                    "measured on them says nothing of new images"
                )
    return tuple(notes)


class _Origin(NamedTuple):
    """What an image was before it was scaled; `deep_highest`: highest shade (0..255) of 16 bits."""

    size: tuple[int, int]
    deep_highest: int | None


def _depth_note(origins: Sequence[_Origin]) -> tuple[str, ...]:
    """A note where 16-bit images hold small values, as those of 12 bits from DICOM do."""
    highest = max((o.deep_highest for o in origins if o.deep_highest is not None), default=255)
    if highest > 256 // 16:
        return ()
    return (
        f"16-bit images use at most {highest + 1} of 256 grey levels: scale their values to "
        "0..65535 first",
    )


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
            headers = _of_all(lambda i: _header(paths[i]), len(paths))
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

    def read(
        self, part: Part, classes: tuple[str, ...], folder: Path
    ) -> tuple[ImageSet, list[_Origin]]:
        paths = part.images
        labels = [classes.index(name) for name, files in part.files.items() for _ in files]
        images = shared_bytes(len(paths), self.channels, self.image_size, self.image_size)

        def fill(i: int) -> _Origin:
            with open_image(paths[i]) as image:
                deep = is_sixteen_bit(image)
                pixels = decode(image, self.channels, str(paths[i]))
            images[i : i + 1] = resize(pixels[None], self.image_size)
            _, height, width = pixels.shape
            return _Origin((width, height), int(pixels.max()) if deep else None)

        origins = _of_all(fill, len(paths))
        names = tuple(path.relative_to(folder).as_posix() for path in paths)
        return ImageSet(images, torch.tensor(labels, dtype=torch.int64), classes, names), origins


def _of_all(read: Callable[[int], R], count: int) -> list[R]:
    """Return [read(0), ..., read(count - 1)], called side by side.

    Raises:
        DataError: of those that failed; the first few are named.
    """

    def attempt(i: int) -> R | DataError:
        try:
            return read(i)
        except DataError as error:
            return error

    results = spread(attempt, count)
    errors = [result for result in results if isinstance(result, DataError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        named = "; ".join(map(str, errors[:MOST_NAMED]))
        more = f"; and {len(errors) - MOST_NAMED:,} more" if len(errors) > MOST_NAMED else ""
        raise DataError(f"{len(errors):,} images cannot be read: {named}{more}")
    return [result for result in results if not isinstance(result, DataError)]


def _header(path: Path) -> tuple[tuple[int, int], bool]:
    """Size and whether it is grey."""
    with open_image(path) as image:
        return image.size, is_grey(image)
