"""Scores against their definitions, written out image by image."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

from densely.errors import DataError
from densely.evaluation.findings import Interval, Scores
from densely.evaluation.scores import check, multilabel_scores, scores_of, wilson_share

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")


def sample(images: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a network that is right more often than not, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 1.5
    return logits, labels


def wilson(hits: int, images: int) -> tuple[float, float]:
    z = 1.959963984540054
    share = hits / images
    middle = share + z * z / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return (middle - half) / (1 + z * z / images), (middle + half) / (1 + z * z / images)


def auroc(is_so: Sequence[bool], output: Sequence[float]) -> float:
    """Share of pairs of an image of the class and another in which the former lies higher."""
    inside = [o for o, so in zip(output, is_so, strict=True) if so]
    outside = [o for o, so in zip(output, is_so, strict=True) if not so]
    return sum((a > b) + (a == b) / 2 for a in inside for b in outside) / (
        len(inside) * len(outside)
    )


def average_precision(is_so: Sequence[bool], output: Sequence[float]) -> float:
    """Mean over the images of the class of the precision down to each (outputs all differ)."""
    ranked = [so for _, so in sorted(zip(output, is_so, strict=True), reverse=True)]
    precisions = [sum(ranked[: i + 1]) / (i + 1) for i, so in enumerate(ranked) if so]
    return sum(precisions) / len(precisions)


def rates(is_so: Sequence[bool], called: Sequence[bool]) -> tuple[float, float, float]:
    hits = sum(a and b for a, b in zip(is_so, called, strict=True))
    precision = hits / sum(called) if any(called) else 0.0
    recall = hits / sum(is_so) if any(is_so) else 0.0
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both else 0.0


def probabilities(logits: Tensor) -> Tensor:
    powers = logits.double().exp()
    return powers / powers.sum(dim=1, keepdim=True)


def test_every_score_is_what_its_definition_says() -> None:
    logits, labels = sample(90, 7)
    labels[:40] = 2  # unequal classes
    result = scores_of(logits, labels, NAMES)
    given = [max(range(7), key=row.__getitem__) for row in logits.tolist()]
    truth = labels.tolist()
    shares = probabilities(logits)
    for k, found in enumerate(result.classes):
        is_so, called = [t == k for t in truth], [g == k for g in given]
        assert (found.name, found.support) == (NAMES[k], sum(is_so))
        assert (found.precision, found.recall, found.f1) == pytest.approx(rates(is_so, called))
        column = shares[:, k].tolist()
        assert found.auroc == pytest.approx(auroc(is_so, column))
        assert found.average_precision == pytest.approx(average_precision(is_so, column))
        counts = [
            sum(t == k and g == j for t, g in zip(truth, given, strict=True)) for j in range(7)
        ]
        assert result.confusion is not None
        assert result.confusion[k].tolist() == counts
    means = {
        name: sum(getattr(c, name) for c in result.classes) / 7
        for name in ("recall", "f1", "auroc", "average_precision")
    }
    assert result.images == 90
    assert result.balanced_accuracy is not None
    assert result.balanced_accuracy.value == pytest.approx(means["recall"])
    assert result.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(truth, given))
    assert result.macro_f1.value == pytest.approx(means["f1"])
    assert result.auroc == pytest.approx(means["auroc"])
    assert result.average_precision == pytest.approx(means["average_precision"])
    hits = sum(t == g for t, g in zip(truth, given, strict=True))
    assert (result.accuracy.low, result.accuracy.high) == pytest.approx(wilson(hits, 90))
    assert result.accuracy.value == pytest.approx(hits / 90)
    among_five = sum(
        sum(other > row[t] for other in row) < 5
        for row, t in zip(logits.tolist(), truth, strict=True)
    )
    assert hits < among_five < 90
    assert result.top5_accuracy is not None
    assert result.top5_accuracy.value == pytest.approx(among_five / 90)
    assert (result.top5_accuracy.low, result.top5_accuracy.high) == pytest.approx(
        wilson(among_five, 90)
    )


def test_wilsons_interval_has_its_published_value() -> None:
    """81 of 263, from Newcombe 1998, table I: 0.2553 to 0.3662."""
    logits = torch.tensor([[1.0, 0.0]]).repeat(263, 1)
    labels = torch.tensor([0] * 81 + [1] * 182)
    found = scores_of(logits, labels, ("a", "b")).accuracy
    assert (found.low, found.high) == (
        pytest.approx(0.2553, abs=5e-5),
        pytest.approx(0.3662, abs=5e-5),
    )


def test_classes_are_ranked_by_probability_and_not_by_logit() -> None:
    """What counts is how sure the network is, and not how large its outputs are."""
    logits = torch.tensor([[9.0, 10.0], [2.0, 0.0], [8.0, 9.0], [3.0, 1.5]])
    result = scores_of(logits, torch.tensor([1, 0, 1, 0]), ("a", "b"))
    assert result.classes[0].auroc == result.classes[1].auroc == 1


def test_a_class_without_images_has_no_ranking_and_does_not_count_for_balanced_accuracy() -> None:
    logits, labels = sample(60, 4)
    labels = labels % 3  # no "dog", which the network gives at times all the same
    logits[:2, 3] += 50
    result = scores_of(logits, labels, NAMES[:4])
    dog = result.classes[3]
    assert (dog.support, dog.recall, dog.precision, dog.f1) == (0, None, None, None)
    assert dog.auroc is dog.average_precision is None
    others = result.classes[:3]
    assert result.balanced_accuracy is not None
    assert result.balanced_accuracy.value == pytest.approx(sum(c.recall for c in others) / 3)
    assert result.balanced_accuracy.low < result.balanced_accuracy.value
    assert result.balanced_accuracy.value < result.balanced_accuracy.high
    assert result.macro_f1.value == pytest.approx(sum(c.f1 for c in others) / 3)
    assert result.auroc == pytest.approx(sum(c.auroc or 0 for c in others) / 3)
    assert result.confusion is not None
    assert result.confusion.shape == (4, 4)


@pytest.mark.parametrize(("classes", "there"), [(5, False), (6, True)])
def test_five_of_five_says_nothing(classes: int, there: bool) -> None:
    result = scores_of(*sample(50, classes), NAMES[:classes])
    assert (result.top5_accuracy is not None) == there


def percentiles(values: list[float]) -> list[float]:
    return np.percentile(values, [2.5, 97.5]).tolist()


def macro_f1(truth: NDArray[np.bool_], given: NDArray[np.bool_]) -> float:
    """Of bool [K, N]."""
    both = truth.sum(axis=1) + given.sum(axis=1)
    return float(np.mean(2 * (truth & given).sum(axis=1) / np.maximum(both, 1)))


def redrawn(truth: list[int], given: list[int], times: int) -> tuple[list[float], list[float]]:
    """Balanced accuracy and macro F1 of images drawn with replacement."""
    generator = np.random.default_rng(12345)
    pairs = np.array([truth, given])
    balanced, macro = [], []
    there = np.unique(truth)
    for _ in range(times):
        drawn = pairs[:, generator.integers(len(truth), size=len(truth))]
        balanced.append(
            np.mean([(drawn[1] == k)[drawn[0] == k].mean() for k in np.unique(drawn[0])])
        )
        macro.append(macro_f1(*(drawn[:, None] == there[:, None])))
    return balanced, macro


@pytest.mark.parametrize("case", ["even", "given too often", "absent"])
def test_intervals_are_those_of_images_drawn_again(case: str) -> None:
    logits, labels = sample(150, 4)
    if case == "given too often":
        logits[:, 3] += 2
        labels[:90] = 0
    elif case == "absent":
        labels = labels % 2
    result = scores_of(logits, labels, NAMES[:4])
    balanced, macro = redrawn(labels.tolist(), logits.argmax(dim=1).tolist(), 400)
    assert result.balanced_accuracy is not None
    for found, expected in ((result.balanced_accuracy, balanced), (result.macro_f1, macro)):
        low, high = percentiles(expected)
        width = high - low
        assert found.low == pytest.approx(low, abs=0.12 * width)
        assert found.high == pytest.approx(high, abs=0.12 * width)


def test_intervals_hold_their_value_when_classes_have_two_images_each() -> None:
    """Percentiles as they are lie below it: what is drawn again lacks one class in seven."""
    labels = torch.arange(80).repeat(2)
    logits = torch.nn.functional.one_hot(labels, 80).float()
    wrong = torch.arange(0, 160, 3)
    logits[wrong] = logits[wrong].roll(1, dims=1)
    result = scores_of(logits, labels, tuple(f"class {k}" for k in range(80)))
    for found in (result.balanced_accuracy, result.macro_f1):
        assert found is not None
        assert found.low < found.value < found.high
        assert 0.1 < found.high - found.low < 0.2  # a share of 2/3 of 160: 0.15


def test_intervals_are_moved_by_the_mean_of_what_is_drawn_again() -> None:
    """Its median lies higher: a class of one image, always right, is missed by every third draw."""
    labels = torch.tensor([0] * 100 + [1])
    given = torch.tensor([0, 1] * 50 + [1])
    logits = torch.nn.functional.one_hot(given, 2).float()
    found = scores_of(logits, labels, NAMES[:2]).balanced_accuracy
    balanced, _ = redrawn(labels.tolist(), given.tolist(), 400)
    assert np.median(balanced) - np.mean(balanced) > 0.05
    assert found is not None
    assert found.value == 0.75
    low, high = (bound + 0.75 - np.mean(balanced) for bound in percentiles(balanced))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))


def test_intervals_stay_between_0_and_1() -> None:
    labels = torch.arange(20).repeat(2)
    logits = torch.nn.functional.one_hot(labels, 20).float()
    logits[0] = logits[1]
    result = scores_of(logits, labels, tuple(f"class {k}" for k in range(20)))
    assert result.macro_f1.value < 1
    assert result.macro_f1.high == 1
    hardly = scores_of(
        torch.tensor([[1.0, 0.0]] + 3 * [[0.0, 1.0]] + 3 * [[1.0, 0.0]]),
        torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        NAMES[:2],
    )
    assert hardly.balanced_accuracy is not None
    assert hardly.balanced_accuracy.low == 0


def test_scores_are_the_same_each_time_and_disturb_no_random_numbers() -> None:
    logits, labels = sample(60, 4)
    torch.manual_seed(3)
    np.random.seed(3)
    first = scores_of(logits, labels, NAMES[:4])
    drawn = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    assert drawn == (torch.rand(1).item(), np.random.rand())
    second = scores_of(logits, labels, NAMES[:4])
    assert (first.macro_f1, first.balanced_accuracy) == (second.macro_f1, second.balanced_accuracy)


def plain(result: Scores) -> bool:
    values: list[object] = [result.auroc, result.average_precision]
    for interval in (
        result.accuracy,
        result.top5_accuracy,
        result.balanced_accuracy,
        result.macro_f1,
    ):
        if isinstance(interval, Interval):
            values += [interval.value, interval.low, interval.high]
    for c in result.classes:
        assert type(c.support) is int
        values += [c.precision, c.recall, c.f1, c.auroc, c.average_precision]
    return all(value is None or type(value) is float for value in values)


def test_values_are_plain() -> None:
    assert plain(scores_of(*sample(50, 7), NAMES))
    assert plain(multilabel_scores(torch.randn(20, 3), torch.rand(20, 3) < 0.5, NAMES[:3]))


def test_outputs_of_any_kind_are_taken() -> None:
    logits, labels = sample(50, 4)
    logits = logits.bfloat16()
    with torch.inference_mode():
        kept = scores_of(logits.float(), labels, NAMES[:4])
    assert scores_of(logits.requires_grad_(), labels, NAMES[:4]).accuracy == kept.accuracy


@pytest.mark.parametrize("classes", [1, 3])
def test_several_labels_an_image_class_by_class(classes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(50, classes, generator=generator) < 0.3
    logits = 2 * torch.randn(50, classes, generator=generator) + 2 * targets - 1
    logits[4, 0] = 0.0  # its sigmoid is 0.5: given
    result = multilabel_scores(logits, targets, NAMES[:classes])
    outputs, truth = logits.tolist(), targets.tolist()
    given = [[1 / (1 + math.exp(-x)) >= 0.5 for x in row] for row in outputs]
    for k, found in enumerate(result.classes):
        is_so, called = [row[k] for row in truth], [row[k] for row in given]
        assert (found.name, found.support) == (NAMES[k], sum(is_so))
        assert (found.precision, found.recall, found.f1) == pytest.approx(rates(is_so, called))
        column = [row[k] for row in outputs]
        assert found.auroc == pytest.approx(auroc(is_so, column))
        assert found.average_precision == pytest.approx(average_precision(is_so, column))
    exact = sum(a == b for a, b in zip(truth, given, strict=True))
    assert 0 < exact < 50
    assert (result.images, result.accuracy.value) == (50, exact / 50)
    assert (result.accuracy.low, result.accuracy.high) == pytest.approx(wilson(exact, 50))
    assert result.macro_f1.value == pytest.approx(sum(c.f1 for c in result.classes) / classes)
    assert result.auroc == pytest.approx(sum(c.auroc or 0 for c in result.classes) / classes)
    assert result.average_precision == pytest.approx(
        sum(c.average_precision or 0 for c in result.classes) / classes
    )
    assert result.confusion is result.balanced_accuracy is result.top5_accuracy is None
    assert multilabel_scores(logits, targets.float(), NAMES[:classes]) == result
    assert multilabel_scores(logits.numpy(), targets.numpy(), NAMES[:classes]) == result


def test_several_labels_interval_is_that_of_images_drawn_again() -> None:
    generator = torch.Generator().manual_seed(2)
    targets = torch.rand(150, 3, generator=generator) < 0.3
    logits = torch.randn(150, 3, generator=generator) + 2 * targets
    logits[:, 0] += 1.5  # given far too often
    found = multilabel_scores(logits, targets, NAMES[:3]).macro_f1
    truth, given = targets.numpy(), (logits > 0).numpy()
    random = np.random.default_rng(99)
    values = []
    for _ in range(400):
        drawn = random.integers(150, size=150)
        values.append(macro_f1(truth[drawn].T, given[drawn].T))
    low, high = percentiles(values)
    assert found.low == pytest.approx(low, abs=0.12 * (high - low))
    assert found.high == pytest.approx(high, abs=0.12 * (high - low))


def test_labels_that_all_or_no_images_have_are_not_ranked() -> None:
    with pytest.raises(DataError, match="no image has a label"):
        multilabel_scores(torch.ones(2, 2), torch.zeros(2, 2), NAMES[:2])
    targets = torch.tensor([[True, False], [True, False]])
    result = multilabel_scores(torch.tensor([[1.0, -1.0], [2.0, -3.0]]), targets, NAMES[:2])
    assert [c.auroc for c in result.classes] == [None, None]
    assert result.auroc is result.average_precision is None
    assert result.accuracy.value == 1


def test_images_that_rightly_get_no_label_are_no_hits_of_a_class_that_is_never_found() -> None:
    targets = torch.tensor([[True, False], [False, False], [False, False]])
    found = multilabel_scores(torch.full((3, 2), -1.0), targets, NAMES[:2])
    assert found.accuracy.value == 2 / 3
    assert found.macro_f1 == wilson_share(0, 3)  # no resample finds it either


def test_large_outputs_of_several_labels_are_still_told_apart() -> None:
    """The sigmoid of both is 1 in float64."""
    logits = torch.tensor([[50.0], [60.0]])
    result = multilabel_scores(logits, torch.tensor([[0], [1]]), ("a",))
    assert result.classes[0].auroc == 1


LOGITS, LABELS = sample(20, 3)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.empty(0, 3), torch.empty(0, dtype=torch.int64), "there are no images"),
        (LOGITS[:, :2], LABELS, r"shape \[20, 2\]: expected \[images, 3\]"),
        (LOGITS[0], LABELS, r"shape \[3\]: expected \[images, 3\]"),
        (LOGITS, LABELS[:19], r"shape \[19\]: expected \[20\]"),
        (LOGITS, LABELS[:, None], r"shape \[20, 1\]: expected \[20\]"),
        (LOGITS, LABELS.float(), "type torch.float32: expected int64"),
        (
            LOGITS,
            LABELS.where(torch.arange(20) != 4, 3),
            "image 4 has the label 3: expected 0 to 2",
        ),
        (LOGITS, LABELS.where(torch.arange(20) != 5, -1), "image 5 has the label -1"),
        (LOGITS, torch.ones_like(LABELS), "one class only, 'bee'"),
        (LOGITS, torch.full((20, 3), 2), "labels of image 0 are not all 0 or 1"),
    ],
)
def test_what_cannot_be_judged_is_named(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(logits, labels, NAMES[:3])
    with pytest.raises(DataError):
        scores_of(logits, labels, NAMES[:3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_counted(bad: float) -> None:
    logits = LOGITS.clone()
    logits[[7, 9, 11], 1] = bad
    message = "NaN or infinity for 3 of 20 images, the first is image 7"
    with pytest.raises(DataError, match=message):
        scores_of(logits, LABELS, NAMES[:3])
    with pytest.raises(DataError, match=message):
        multilabel_scores(logits, torch.zeros(20, 3), NAMES[:3])


def test_one_label_an_image_is_not_taken_for_several_nor_several_for_one() -> None:
    with pytest.raises(DataError, match=r"targets have the shape \[20\]"):
        multilabel_scores(LOGITS, LABELS, NAMES[:3])
    with pytest.raises(DataError, match=r"labels have the shape \[20, 3\]"):
        scores_of(LOGITS, torch.zeros(20, 3), NAMES[:3])


@pytest.mark.parametrize(("right", "low", "high"), [(True, 0.722, 1.0), (False, 0.0, 0.278)])
def test_few_images_that_are_all_right_or_none_do_not_make_certain(
    right: bool, low: float, high: float
) -> None:
    labels = torch.arange(10) % 2
    logits = torch.nn.functional.one_hot(labels if right else 1 - labels, 2).float()
    found = scores_of(logits, labels, NAMES[:2])
    for interval in (found.balanced_accuracy, found.macro_f1):
        assert interval == found.accuracy
        assert (interval.low, interval.high) == (
            pytest.approx(low, abs=1e-3),
            pytest.approx(high, abs=1e-3),
        )


@pytest.mark.parametrize("seed", range(30))
def test_intervals_of_small_sets_hold_their_value(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    classes = 2 + seed % 6
    logits, labels = sample(6 + seed, classes, seed)
    labels[:2] = torch.tensor([0, 1])
    logits[torch.rand(len(labels), generator=generator) < 0.5] *= 3
    found = scores_of(logits, labels, tuple(f"class {k}" for k in range(classes)))
    for interval in (found.accuracy, found.balanced_accuracy, found.macro_f1):
        assert interval is not None
        assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_equals_are_ranked_alike_for_one_answer_and_for_five() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 0, 6, 0])
    found = scores_of(torch.zeros(8, 7), labels, NAMES)
    assert found.top5_accuracy is not None
    assert (found.accuracy.value, found.top5_accuracy.value) == (5 / 8, 7 / 8)


def test_of_many_equal_logits_the_first_class_wins() -> None:
    """Sorting keeps the order of a few equals by itself, and not of many."""
    names = tuple(f"class {k}" for k in range(100))
    found = scores_of(torch.zeros(8, 100), torch.arange(8), names)
    assert found.confusion is not None
    assert found.confusion[:8, 0].tolist() == [1] * 8
    assert found.top5_accuracy is not None
    assert (found.accuracy.value, found.top5_accuracy.value) == (1 / 8, 5 / 8)


def test_sure_images_are_ranked_where_their_probabilities_round_to_1() -> None:
    margins = torch.tensor([60.0, 70.0, 80.0, 90.0])
    logits = torch.stack((torch.zeros(4), margins, torch.full((4,), -5.0)), dim=1)
    found = scores_of(logits, torch.tensor([0, 0, 1, 1]), NAMES[:3])
    assert found.classes[1].auroc == 1
    assert found.classes[0].auroc == 1
