"""A labelled set of images as uint8 tensors, and how one is split in two.

The splits are made here and not by scikit-learn, whose stratified split may leave a rare class out
of a part without a word.
"""

import hashlib
import math
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

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
        names: file of each image, from the data folder on, with / between its parts; None for
            data sets without files.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "ImageSet":
        """Copy to `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def digest(self) -> str:
        """Short name of these very images, labels and classes, whatever files they are in."""
        hasher = hashlib.blake2b(digest_size=16)
        hasher.update(repr((tuple(self.images.shape), self.classes)).encode(errors="replace"))
        for tensor in (self.images, self.labels):
            values: Any = tensor.cpu().contiguous().numpy()
            hasher.update(values)
        return hasher.hexdigest()

    def digests(self) -> list[bytes]:
        """Of each image by itself: two that have one are the same to the last pixel."""
        images: Any = self.images.cpu().contiguous().numpy()
        return [hashlib.blake2b(image, digest_size=16).digest() for image in images]

    def count_among(self, digests: Container[bytes]) -> int:
        """How many images are, to the last pixel, ones of these digests."""
        return sum(digest in digests for digest in self.digests())

    def subset(self, indices: Tensor) -> "ImageSet":
        """Take the images at `indices` (int64 [M])."""
        names = None if self.names is None else tuple(self.names[i] for i in indices.tolist())
        return ImageSet(self.images[indices], self.labels[indices], self.classes, names)


@dataclass(frozen=True)
class Splits:
    """What a data set offers: `train` to learn from, `test` to judge by, `validation` to choose by.

    Args:
        name: of the data set.
        train, test: the images.
        validation: None where the source has none of its own.
        notes: what a user may not expect of them, for people to read.
        original_sizes: width and height of the smallest and of the largest image before they were
            scaled; None where they are as they came.
    """

    name: str
    train: ImageSet
    test: ImageSet
    validation: ImageSet | None = None
    notes: tuple[str, ...] = ()
    original_sizes: tuple[tuple[int, int], tuple[int, int]] | None = None

    def overview(self) -> str:
        """One line for people: how many images and classes there are, and of what size."""
        held_out = f"{len(self.test):,} test images"
        if self.validation is not None:
            held_out = f"{len(self.validation):,} validation, {held_out}"
        height, width = self.train.images.shape[-2:]
        smallest, largest = self.original_sizes or ((width, height), (width, height))
        sizes = " to ".join(f"{w}x{h}" for w, h in dict.fromkeys((smallest, largest)))
        scaled = "" if smallest == largest == (width, height) else f", scaled to {width}x{height}"
        return (
            f"{len(self.train):,} training, {held_out}; {len(self.train.classes):,} classes; "
            f"images of {sizes} pixels{scaled}"
        )


def stratified_split(
    labels: Tensor,
    classes: tuple[str, ...],
    second: int | float,
    seed: int,
    what: str,
    notes: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Indices of two parts with the classes in proportion, the same for the same seed.

    Args:
        labels: int64 [N].
        classes: names of the classes, for messages.
        second: share (below 1) or number (an int) of images in the second part.
        seed: of the random choice.
        what: what the second part is for, for messages: "test", "validation".
        notes: on the images, which end messages: they may say why there are too few.

    Returns:
        Sorted int64 indices of the first and of the second part.

    Raises:
        DataError: a class has a single image, or there are too few for one of each in each part.
    """
    counts = torch.bincount(labels, minlength=len(classes))
    for name, count in zip(classes, counts.tolist(), strict=True):
        if count < 2:
            message = (
                f"class '{name}' has {count} image(s) to train from: at least 2 are needed to set "
                f"some aside for {what}"
            )
            raise DataError("; ".join((message, *notes)))
    total = second if isinstance(second, int) else math.ceil(second * len(labels))
    if not len(classes) <= total <= len(labels) - len(classes):
        way_out = "--validation 0" if what == "validation" else "a folder test/ beside train/"
        message = (
            f"{len(labels)} images of {len(classes)} classes are too few to set {second} of them "
            f"aside for {what}: add images, or {way_out}"
        )
        raise DataError("; ".join((message, *notes)))
    taken = _fair_shares(counts, total).clamp(torch.ones_like(counts), counts - 1)
    return _chosen(labels, taken, seed)


def limited(images: ImageSet, limit: int | None, seed: int) -> ImageSet:
    """Keep at most `limit` images, in proportion to the classes and at least one of each.

    Raises:
        DataError: `limit` is less than the number of classes.
    """
    if limit is None or limit >= len(images):
        return images
    if limit < len(images.classes):
        raise DataError(f"limit={limit} is too few for {len(images.classes)} classes")
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    taken = _fair_shares(counts, limit).clamp(min=1)
    excess = taken * len(images) - counts * limit  # over the exact share, in parts of an image
    while taken.sum() > limit:  # rare classes were given their one: the others make room
        most = excess.where(taken > 1, excess.min() - 1).argmax()
        taken[most] -= 1
        excess[most] -= len(images)
    return images.subset(_chosen(images.labels, taken, seed)[1])


def _fair_shares(counts: Tensor, total: int) -> Tensor:
    """Part `total` in proportion to `counts`, the rest of rounding to the largest remainders."""
    exact = counts * total
    shares = exact // counts.sum()
    order = (exact % counts.sum()).argsort(descending=True, stable=True)
    shares[order[: total - int(shares.sum())]] += 1
    return shares


def _chosen(labels: Tensor, taken: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of the rest, and of `taken[c]` random images of each class c."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    second = torch.zeros(len(labels), dtype=torch.bool)
    for c, number in enumerate(taken.tolist()):
        second[order[labels[order] == c][:number]] = True
    return (~second).nonzero().flatten(), second.nonzero().flatten()
