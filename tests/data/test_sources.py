from pathlib import Path

import pytest
import torch
from PIL import Image

from densely.data import limited, load_data, with_validation
from densely.data.dataset import ImageSet, Splits
from densely.errors import DataError

CLASSES = ("ant", "bee", "cat")


def numbered(*counts: int) -> ImageSet:
    """Images whose pixel is their number, labels in turn."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(pixels, labels, CLASSES[: len(counts)])


def numbers(images: ImageSet | None) -> list[int]:
    assert images is not None
    return images.images.flatten().tolist()


def assert_still_labelled(part: ImageSet, whole: ImageSet) -> None:
    assert part.labels.tolist() == [int(whole.labels[number]) for number in numbers(part)]
    assert part.classes == whole.classes


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (8, 8), i).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_named_data_set_is_loaded() -> None:
    splits = load_data("digits")
    assert splits.name == "digits"
    assert len(splits.train) + len(splits.test) == 1797


def test_split_seed_reaches_the_source(photos: Path) -> None:
    for data in ("digits", str(photos)):
        images = [load_data(data, split_seed=seed).test.images for seed in (1, 1, 2)]
        assert images[0].equal(images[1])
        assert not images[0].equal(images[2])


def test_data_dir_is_where_fashion_mnist_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").touch()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz") as caught:
        load_data("fashion-mnist", data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_folder_is_loaded_with_size_and_channels(photos: Path) -> None:
    splits = load_data(str(photos), image_size=5, channels=3)
    assert splits.train.images.shape == (16, 3, 5, 5)
    assert splits.test.images.shape == (4, 3, 5, 5)


@pytest.mark.parametrize(
    ("typed", "meant"), [("fashion_mnist", "fashion-mnist"), ("digit", "digits")]
)
def test_unknown_name_is_told_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(DataError, match=f"'{typed}'.* {meant}"):
        load_data(typed)


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize("own", [None, numbered(1, 1)])
def test_share_0_leaves_no_validation(own: ImageSet | None) -> None:
    splits = Splits("set", numbered(10, 10), numbered(3, 3), own)
    result = with_validation(splits, 0, 0)
    assert result.validation is None
    assert numbers(result.train) == numbers(splits.train)
    assert result.test is splits.test


@pytest.mark.parametrize("share", [0.1, 0])
def test_notes_and_sizes_are_carried_on(share: float) -> None:
    sizes = ((3, 4), (5, 6))
    splits = Splits("set", numbered(10, 10), numbered(3, 3), None, ("one",), sizes)
    result = with_validation(splits, share, 0)
    assert (result.notes, result.original_sizes) == (("one",), sizes)


def test_validation_left_unused_is_noted() -> None:
    splits = Splits("set", numbered(10, 10), numbered(3, 3), numbered(1, 1), ("one",))
    notes = with_validation(splits, 0, 0).notes
    assert notes == ("one", "validation=0: 2 validation images are left unused")


def test_validation_of_its_own_is_kept() -> None:
    splits = Splits("set", numbered(10, 10), numbered(3, 3), numbered(2, 2))
    result = with_validation(splits, 0.5, 0)
    assert result.validation is splits.validation
    assert numbers(result.train) == numbers(splits.train)
    assert result.test is splits.test


def test_validation_is_a_fair_share_of_the_training_images() -> None:
    splits = Splits("set", numbered(20, 40, 60), numbered(3, 3, 3))
    result = with_validation(splits, 0.1, 0)
    assert sorted(numbers(result.train) + numbers(result.validation)) == list(range(120))
    assert result.validation is not None
    assert result.validation.labels.bincount().tolist() == [2, 4, 6]
    assert_still_labelled(result.train, splits.train)
    assert_still_labelled(result.validation, splits.train)
    assert result.test is splits.test
    assert result.name == "set"


def test_validation_follows_its_seed() -> None:
    splits = Splits("set", numbered(20, 20), numbered(3, 3))
    first = numbers(with_validation(splits, 0.5, 1).validation)
    assert numbers(with_validation(splits, 0.5, 1).validation) == first
    assert numbers(with_validation(splits, 0.5, 2).validation) != first


def test_too_few_images_for_validation_are_refused() -> None:
    with pytest.raises(DataError, match=r"'bee'.*validation"):
        with_validation(Splits("set", numbered(20, 1), numbered(3, 3)), 0.1, 0)


def test_too_few_images_may_have_a_reason() -> None:
    splits = Splits("set", numbered(20, 1), numbered(3, 3), notes=("7 files left out",))
    with pytest.raises(DataError, match="for validation; 7 files left out"):
        with_validation(splits, 0.1, 0)


@pytest.mark.parametrize("limit", [3, 6, 12, 60, 117, 118, 119])
def test_a_limit_keeps_the_shares_of_the_classes(limit: int) -> None:
    whole = numbered(20, 40, 60)
    part = limited(whole, limit, 0)
    assert len(part) == len(set(numbers(part))) == limit
    shares = torch.tensor([20, 40, 60]) * limit / 120
    assert (part.labels.bincount(minlength=3) - shares).abs().max() <= 1
    assert_still_labelled(part, whole)


@pytest.mark.parametrize(
    ("counts", "limit", "taken"),
    [
        ((190, 190, 2), 20, [9, 10, 1]),
        ((100, 90, 2), 20, [10, 9, 1]),  # exact: 10.4, 9.4, 0.2
        ((96, 94, 2), 19, [9, 9, 1]),  # exact: 9.5, 9.3, 0.2
        ((200, 1, 1), 3, [1, 1, 1]),
        ((200, 1, 1), 20, [18, 1, 1]),
    ],
)
def test_a_limit_holds_with_one_of_each_rare_class(
    counts: tuple[int, ...], limit: int, taken: list[int]
) -> None:
    assert limited(numbered(*counts), limit, 0).labels.bincount().tolist() == taken


@pytest.mark.parametrize("limit", [None, 60, 1000])
def test_no_limit_keeps_all(limit: int | None) -> None:
    assert numbers(limited(numbered(20, 40), limit, 0)) == list(range(60))


def test_a_limit_follows_its_seed() -> None:
    whole = numbered(20, 40)
    assert numbers(limited(whole, 10, 1)) == numbers(limited(whole, 10, 1))
    assert numbers(limited(whole, 10, 1)) != numbers(limited(whole, 10, 2))
