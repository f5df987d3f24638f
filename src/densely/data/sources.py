"""From what the user calls a data set to its images: one of the named ones, or a folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from densely.data.dataset import Splits, stratified_split
from densely.data.digits import load_digits
from densely.data.fashion_mnist import load_fashion_mnist
from densely.data.folder import load_folder
from densely.errors import DataError, unknown_name

_NAMED: dict[str, Callable[[Path | None, int], Splits]] = {
    "digits": lambda data_dir, split_seed: load_digits(split_seed),
    "fashion-mnist": lambda data_dir, split_seed: load_fashion_mnist(data_dir),
}

_FETCHED = {"fashion-mnist"}


def load_data(
    data: str,
    *,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    split_seed: int = 0,
) -> Splits:
    """Read a data set as uint8 tensors.

    Args:
        data: "digits", "fashion-mnist", or a folder of images (see `densely.data.folder`).
        data_dir: where the files of a named data set are looked for first.
        image_size: side that the images of a folder are scaled to; named data sets come as they
            are, and are scaled batch by batch.
        channels: 1 or 3; None to follow the images. Those of a folder are converted.
        split_seed: of splits that the source does not make itself.

    Raises:
        DataError: no such data set or folder, or it is damaged.
    """
    if data in _NAMED:
        splits = _NAMED[data](Path(data_dir) if data_dir else None, split_seed)
        found = splits.train.images.shape[1]
        if channels not in (None, found):
            raise DataError(f"{data} has images of {found} channel(s), not of {channels}")
        return splits
    if not Path(data).is_dir():
        raise DataError(
            f"{unknown_name('data set', data, _NAMED)}; nor is there a folder {data}: "
            "name one with --data"
        )
    return load_folder(Path(data), image_size, split_seed, channels)


def is_here(data: str) -> bool:
    """Whether a data set is on this machine, or comes with a package: nothing is fetched for it."""
    return data not in _FETCHED


def absolute(data: str) -> str:
    """The same data set; a folder by its full path, so that it is found from elsewhere."""
    is_folder = data not in _NAMED and Path(data).is_dir()
    return str(Path(data).resolve()) if is_folder else data


def with_validation(splits: Splits, share: float, split_seed: int) -> Splits:
    """Set `share` of the training images aside for validation, unless the source has its own.

    Shares in proportion to the classes; the same images for the same `split_seed`. With share 0
    nothing is set aside, and a validation split of the source is left unused, which a note says.
    """
    if share == 0 and splits.validation is not None:
        unused = f"validation=0: {len(splits.validation):,} validation images are left unused"
        return dataclasses.replace(splits, validation=None, notes=(*splits.notes, unused))
    if share == 0 or splits.validation is not None:
        return splits
    train = splits.train
    first, second = stratified_split(
        train.labels, train.classes, share, split_seed, "validation", splits.notes
    )
    return dataclasses.replace(splits, train=train.subset(first), validation=train.subset(second))
