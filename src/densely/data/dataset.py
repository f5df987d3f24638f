"""A labelled set of images as uint8 tensors, and how one is split in two."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from densely.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels, all of one size.

    Args:
        images: uint8 [N, C, H, W], C = 1 (grey) or 3 (RGB).
        labels: int64 [N], indices into `classes`.
        classes: names of the classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "ImageSet":
        """Copy to `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)

    def subset(self, indices: Tensor) -> "ImageSet":
        """Take the images at `indices` (int64 [M])."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes)


@dataclass(frozen=True)
class Splits:
    """What a data set offers: `train` to learn from, `test` to judge by, `validation` to choose by.

    `validation` is None where the source has none of its own.
    """

    name: str
    train: ImageSet
    test: ImageSet
    validation: ImageSet | None = None


def stratified_split(
    labels: Tensor, classes: tuple[str, ...], second: int | float, seed: int, what: str
) -> tuple[Tensor, Tensor]:
    """Indices of two parts with equal shares of each class, the same for the same seed.

    Args:
        labels: int64 [N].
        classes: names of the classes, for messages.
        second: share (below 1) or number (an int) of images in the second part.
        seed: of the random choice.
        what: what the second part is for, for messages: "test", "validation".

    Returns:
        Sorted int64 indices of the first and of the second part.

    Raises:
        DataError: a class has a single image, or a part would not hold one image of each class.
    """
    from sklearn.model_selection import train_test_split

    counts = torch.bincount(labels, minlength=len(classes))
    for name, count in zip(classes, counts.tolist(), strict=True):
        if count < 2:
            raise DataError(
                f"class '{name}' has {count} image(s) to train from: at least 2 are needed to set "
                f"some aside for {what}"
            )
    try:
        first_part, second_part = train_test_split(
            np.arange(len(labels)), test_size=second, random_state=seed, stratify=labels.numpy()
        )
    except ValueError as error:
        raise DataError(
            f"{len(labels)} images of {len(classes)} classes are too few to set {second} of them "
            f"aside for {what}: add images, or change the share"
        ) from error
    return torch.from_numpy(np.sort(first_part)), torch.from_numpy(np.sort(second_part))
