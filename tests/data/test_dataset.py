import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densely.data.dataset import ImageSet, stratified_split
from densely.errors import DataError

CLASSES = ("ant", "bee", "cat")


def mixed_labels(*counts: int) -> torch.Tensor:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(10, 40), min_size=2, max_size=5),
    share=st.sampled_from([0.1, 0.2, 0.25, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_are_disjoint_complete_sorted_and_fair(
    counts: list[int], share: float, seed: int
) -> None:
    labels = mixed_labels(*counts)
    classes = tuple(f"class {i}" for i in range(len(counts)))
    first, second = stratified_split(labels, classes, share, seed, "test")
    assert first.dtype == second.dtype == torch.int64
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(len(labels)))
    assert first.tolist() == sorted(first.tolist())
    assert second.tolist() == sorted(second.tolist())
    for label, count in enumerate(counts):
        fair = len(second) * count / len(labels)  # of as many as there are: share is rounded up
        assert abs(int((labels[second] == label).sum()) - fair) < 1


def test_an_int_is_the_number_in_the_second_part() -> None:
    first, second = stratified_split(mixed_labels(20, 40, 60), CLASSES, 30, 0, "test")
    assert (len(first), len(second)) == (90, 30)
    assert mixed_labels(20, 40, 60)[second].bincount().tolist() == [5, 10, 15]


def test_the_split_follows_its_seed() -> None:
    labels = mixed_labels(20, 20, 20)
    first = stratified_split(labels, CLASSES, 0.5, 1, "test")[0]
    assert first.equal(stratified_split(labels, CLASSES, 0.5, 1, "test")[0])
    assert not first.equal(stratified_split(labels, CLASSES, 0.5, 2, "test")[0])


@pytest.mark.parametrize("few", [0, 1])
def test_a_class_too_small_to_split_is_named(few: int) -> None:
    with pytest.raises(DataError, match=r"'bee' has .*validation"):
        stratified_split(mixed_labels(10, few, 10), CLASSES, 0.5, 0, "validation")


@pytest.mark.parametrize(
    ("what", "way_out"),
    [("validation", "--validation 0"), ("test", "a folder test/ beside train/")],
)
def test_too_few_to_part_come_with_a_way_out(what: str, way_out: str) -> None:
    with pytest.raises(DataError, match=f"too few to set .* add images, or {way_out}"):
        stratified_split(torch.tensor([0, 0, 1, 1]), ("a", "b"), 0.2, 0, what)


def test_a_second_part_smaller_than_the_classes_are_many_is_refused() -> None:
    with pytest.raises(DataError, match="test"):
        stratified_split(mixed_labels(3, 3, 3), CLASSES, 2, 0, "test")


@pytest.mark.parametrize("counts", [(100, 100, 2), (100, 3, 100), (1000, 1000, 2)])
def test_a_rare_class_is_in_both_parts_or_named(counts: tuple[int, ...]) -> None:
    labels = mixed_labels(*counts)
    rare = counts.index(min(counts))
    try:
        parts = stratified_split(labels, CLASSES, 0.1, 0, "test")
    except DataError as error:
        message = str(error)
        assert CLASSES[rare] in message
    else:
        assert [rare in labels[part].tolist() for part in parts] == [True, True]


def test_a_subset_keeps_images_and_labels_together() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    labels = torch.tensor([0, 1, 2, 0, 1])
    whole = ImageSet(images, labels, CLASSES, tuple("vwxyz"))
    part = whole.subset(torch.tensor([4, 2]))
    assert len(part) == 2
    assert part.images.flatten().tolist() == [4, 2]
    assert part.labels.tolist() == [1, 2]
    assert part.classes == CLASSES
    assert part.names == ("z", "x")
    assert part.to(torch.device("cpu")).names == part.names
    unnamed = ImageSet(images, labels, CLASSES)
    assert unnamed.subset(torch.tensor([4, 2])).names is None
    assert unnamed.digest() == whole.digest()  # wherever images lie, they are the same ones
    assert ImageSet(images, labels.flip(0), CLASSES).digest() != whole.digest()
    assert ImageSet(images.flip(0), labels, CLASSES).digest() != whole.digest()
