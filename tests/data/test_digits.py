import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from densely.data import digits
from densely.data.dataset import ImageSet
from densely.data.digits import load_digits


def pictures(images: ImageSet) -> list[tuple[bytes, int]]:
    """Each image's bytes with its label, in an order that depends on nothing else."""
    return sorted(
        (image.numpy().tobytes(), int(label))
        for image, label in zip(images.images, images.labels, strict=True)
    )


def test_shapes_types_and_classes() -> None:
    splits = load_digits(0)
    assert splits.name == "digits"
    assert splits.validation is None
    for part, count in ((splits.train, 1437), (splits.test, 360)):
        assert part.images.shape == (count, 1, 8, 8)
        assert part.labels.shape == (count,)
        assert (part.images.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
        assert part.classes == tuple("0123456789")


def test_without_its_file_scikit_learn_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digits._rows()
    monkeypatch.setattr(digits, "find_spec", lambda _: None)
    found = digits._rows()
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_pixels_use_the_whole_range() -> None:
    images = load_digits(0).train.images
    assert (int(images.min()), int(images.max())) == (0, 255)


def test_the_two_parts_are_all_digits_and_share_none() -> None:
    source = sklearn_digits()
    grey = np.rint(source.images * (255 / 16)).astype(np.uint8)
    expected = sorted(
        (image.tobytes(), int(label)) for image, label in zip(grey, source.target, strict=True)
    )
    assert len(set(expected)) == 1797  # no two are alike, so the comparison finds a shared one
    splits = load_digits(0)
    assert sorted(pictures(splits.train) + pictures(splits.test)) == expected


def test_classes_have_equal_shares() -> None:
    splits = load_digits(0)
    tested = splits.test.labels.bincount()
    whole = tested + splits.train.labels.bincount()
    assert (tested - whole * 360 / 1797).abs().max() < 1


def test_the_split_follows_its_seed() -> None:
    assert load_digits(3).test.images.equal(load_digits(3).test.images)
    assert pictures(load_digits(3).test) != pictures(load_digits(4).test)
