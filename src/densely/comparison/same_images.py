"""Whether two networks are judged on the same images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from densely.data import ImageSet


@dataclass(frozen=True)
class Identity:
    """What tells a set of images from another; the images themselves are let go.

    Args:
        classes: their names.
        shape: of all images: those of a folder are scaled for each run.
        digest: of pixels and labels.
        labels: int64 [N].
        source: where they come from.
        split_seed: as it was parted.
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    digest: str
    labels: Tensor
    source: str
    split_seed: int


def identity(images: ImageSet, source: str, split_seed: int) -> Identity:
    """Of images on any device."""
    shape = tuple(images.images.shape)
    return Identity(images.classes, shape, images.digest(), images.labels.cpu(), source, split_seed)


def same_images(one: Identity, other: Identity) -> bool:
    """Whether they are the same, or those of one folder in two sizes, parted in the same way."""
    if one.classes != other.classes:
        return False
    if one.shape == other.shape:
        return one.digest == other.digest
    alike = (one.source, one.split_seed) == (other.source, other.split_seed)
    return alike and torch.equal(one.labels, other.labels)
