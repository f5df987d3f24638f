"""Selective answers: the curve by brute force, the threshold by its paper, its promise by drawing.

Two classes and logits (t, 0) make every confidence 1 / (1 + exp(-|t|)).
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import bdtr
from torch import Tensor

from densely.errors import ConfigError
from densely.evaluation.findings import Choice
from densely.evaluation.selective import risk_bound, risk_coverage, threshold_for


def answers(confidence: list[float], right: list[bool]) -> tuple[Tensor, Tensor]:
    """Logits and labels of images that are answered so."""
    sure = torch.tensor(confidence, dtype=torch.float64)
    logits = torch.stack([(sure / (1 - sure)).log(), torch.zeros(len(sure))], dim=1)
    return logits, (~torch.tensor(right)).long()


def sampled(
    images: int, seed: int, hardness: float = 1.0, levels: int = 0
) -> tuple[list[float], list[bool]]:
    """Confidences in (0.5, 1), errors fewer the higher they are; at `levels` many values."""
    generator = np.random.default_rng(seed)
    sure = generator.random(images)
    if levels:
        sure = np.floor(sure * levels) / levels
    right = generator.random(images) > hardness * 0.5 * (1 - sure) ** 2
    return (0.5 + 0.499 * sure).tolist(), right.tolist()


def risks(confidence: list[float], right: list[bool]) -> dict[float, float]:
    """Share of wrong ones among images of at least a confidence, by the share of images."""
    found = {}
    for threshold in sorted(set(confidence), reverse=True):
        chosen = [r for c, r in zip(confidence, right, strict=True) if c >= threshold]
        found[len(chosen) / len(right)] = chosen.count(False) / len(chosen)
    return found


@pytest.mark.parametrize("levels", [0, 6])
def test_the_curve_has_a_point_for_each_confidence(levels: int) -> None:
    confidence, right = sampled(200, seed=0, levels=levels)
    found = risk_coverage(*answers(confidence, right), [])
    expected = risks(confidence, right)
    assert len(expected) == (levels or 200)
    assert found.coverage == tuple(expected)
    assert found.risk == tuple(expected.values())
    assert found.coverage[-1] == 1
    assert found.choices == ()
    assert {type(value) for value in (*found.coverage, *found.risk, found.area)} == {float}


def test_the_area_is_the_mean_risk_over_all_coverages() -> None:
    """Surest first: right, wrong, right, wrong."""
    found = risk_coverage(*answers([0.9, 0.6, 0.7, 0.8], [True, False, True, False]), [])
    assert found.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert found.risk == (0, 1 / 2, 1 / 3, 2 / 4)


def test_equal_confidences_enter_the_area_as_on_average_over_their_orders() -> None:
    confidence, right = [0.9, 0.8, 0.8, 0.8, 0.6, 0.6], [True, False, True, False, True, False]
    orders = [
        order
        for order in itertools.permutations(range(6))
        if [confidence[i] for i in order] == confidence
    ]
    areas = [
        sum(sum(not right[i] for i in order[:k]) / k for k in range(1, 7)) / 6 for order in orders
    ]
    assert len(orders) == 12
    found = risk_coverage(*answers(confidence, right), [])
    assert found.area == pytest.approx(sum(areas) / 12)
    assert found.coverage == (1 / 6, 4 / 6, 1)
    assert found.risk == (0, 2 / 4, 3 / 6)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(24)))
def test_the_order_of_images_does_not_matter(order: list[int]) -> None:
    logits, labels = answers(*sampled(24, seed=3, hardness=2.0, levels=4))
    first = risk_coverage(logits, labels, [(0.3, 0.7)])
    second = risk_coverage(logits[order], labels[order], [(0.3, 0.7)])
    assert (second.coverage, second.risk) == (first.coverage, first.risk)
    assert second.choices == first.choices
    assert second.area == pytest.approx(first.area, abs=1e-12)
    for wanted in (0.2, 0.5, 0.7):
        assert threshold_for(logits, labels, wanted) == threshold_for(
            logits[order], labels[order], wanted
        )


def test_a_long_curve_is_thinned_and_its_area_is_not() -> None:
    confidence, right = sampled(1777, seed=4)
    found = risk_coverage(*answers(confidence, right), [])
    expected = risks(confidence, right)
    assert len(found.coverage) == len(found.risk) == 500
    assert (found.coverage[0], found.coverage[-1]) == (1 / 1777, 1)
    assert all(expected[c] == r for c, r in zip(found.coverage, found.risk, strict=True))
    steps = np.diff(found.coverage)
    assert steps.min() > 0
    assert steps.max() < 2 / 500
    assert found.area == pytest.approx(np.mean(list(expected.values())))


def test_choices_are_judged_on_the_images_given() -> None:
    confidence, right = [0.9, 0.8, 0.8, 0.6], [True, True, False, False]
    logits, labels = answers(confidence, right)
    exact = logits.softmax(dim=1).max(dim=1).values.tolist()
    asked = [(0.1, exact[0]), (0.4, exact[1]), (0.2, 0.95), (0.01, None), (0.6, 0.5)]
    found = risk_coverage(logits, labels, asked).choices
    assert found == (
        Choice(0.1, exact[0], 1 / 4, 0.0),
        Choice(0.4, exact[1], 3 / 4, 1 / 3),
        Choice(0.2, 0.95, 0.0, None),
        Choice(0.01, None, 0.0, None),
        Choice(0.6, 0.5, 1.0, 2 / 4),
    )


def highest_error(errors: int, answered: int, delta: float) -> float:
    """The b for which so few errors have the probability delta (lemma 3.1), by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if bdtr(errors, answered, middle) > delta else (low, middle)
    return low


@pytest.mark.parametrize(("errors", "answered"), [(0, 1), (0, 500), (3, 40), (39, 40), (40, 40)])
def test_the_bound_is_the_lemmas(errors: int, answered: int) -> None:
    for delta in (0.2, 0.05, 1e-4):
        found = risk_bound(errors, answered, delta)
        assert found == pytest.approx(highest_error(errors, answered, delta), rel=1e-9)
        assert found > errors / answered or errors == answered


def by_the_paper(
    confidence: list[float], right: list[bool], wanted_error: float, delta: float
) -> float | None:
    """Algorithm 1, but that all images come first and the last threshold that passed is given."""
    ranked = sorted(zip(confidence, right, strict=True))
    m = len(ranked)
    z_min, z_max, passed = 1, m, None
    k = math.ceil(math.log2(m)) + 1
    if highest_error(right.count(False), m, delta / k) < wanted_error:
        return ranked[0][0]
    for _ in range(k - 1):
        z = math.ceil((z_min + z_max) / 2)
        theta = ranked[z - 1][0]
        selected = [r for c, r in ranked if c >= theta]
        if highest_error(selected.count(False), len(selected), delta / k) < wanted_error:
            z_max, passed = z, theta
        else:
            z_min = z
    return passed


@pytest.mark.parametrize("levels", [0, 7])
@pytest.mark.parametrize("images", [2, 64, 65, 300])
def test_the_threshold_is_the_papers(images: int, levels: int) -> None:
    reached = set()
    for seed in range(3):
        confidence, right = sampled(images, seed, levels=levels)
        logits, labels = answers(confidence, right)
        exact = logits.softmax(dim=1).max(dim=1).values.tolist()
        for wanted, level in ((0.04, 0.95), (0.1, 0.95), (0.1, 0.5), (0.18, 0.9), (0.3, 0.95)):
            found = threshold_for(logits, labels, wanted, level)
            assert found == by_the_paper(exact, right, wanted, 1 - level)
            assert found is None or type(found) is float
            reached.add(found)
    assert None in reached
    assert len(reached) > (2 if images > 2 else 0)


@pytest.mark.parametrize("images", [144, 300])
def test_a_network_that_is_always_right_answers_all(images: int) -> None:
    """The search of the paper never tries the lowest confidence; of 144 images it finds none."""
    confidence, right = sampled(images, 0, hardness=0.0)
    found = threshold_for(*answers(confidence, right), 0.05)
    assert found == pytest.approx(min(confidence))


def test_what_cannot_be_promised_is_not() -> None:
    """20 right answers do not show that less than 1% are wrong, nor does one."""
    assert threshold_for(*answers(*sampled(20, 0, hardness=0.0)), 0.01) is None
    assert threshold_for(*answers([0.9], [True]), 0.5) is None
    confidence, right = sampled(200, 0)
    assert threshold_for(*answers(confidence, [not r for r in right]), 0.2) is None


def true_risk(threshold: float) -> float:
    """Of `sampled`: mean of 0.5 (1 - s)^2 over s from the threshold's s to 1."""
    s = (threshold - 0.5) / 0.499
    return 0.5 * (1 - s) ** 2 / 3


def test_the_promise_is_kept() -> None:
    """Of 200 thresholds at most 1 in 20 has a true error above what was wanted."""
    wanted, broken, coverages = 0.1, 0, []
    for seed in range(200):
        found = threshold_for(*answers(*sampled(300, 1000 + seed)), wanted)
        if found is not None:
            broken += true_risk(found) > wanted
            coverages.append(1 - (found - 0.5) / 0.499)
    assert broken <= 10
    # 0.77 of all images could be answered, were the errors known.
    assert true_risk(1 - 0.499 * 0.7746) == pytest.approx(wanted, rel=0.02)
    assert len(coverages) > 140
    assert 0.4 < np.mean(coverages) < 0.7


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 200),
    levels=st.sampled_from([0, 3, 10]),
    wanted=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)),
    level=st.tuples(st.floats(0.5, 0.999), st.floats(0.5, 0.999)),
)
def test_more_is_answered_the_less_is_promised(
    seed: int,
    images: int,
    levels: int,
    wanted: tuple[float, float],
    level: tuple[float, float],
) -> None:
    logits, labels = answers(*sampled(images, seed, levels=levels))

    def lowest(wanted_error: float, confidence: float) -> float:
        found = threshold_for(logits, labels, wanted_error, confidence)
        return 1.0 if found is None else found

    assert lowest(max(wanted), level[0]) <= lowest(min(wanted), level[0])
    assert lowest(wanted[0], min(level)) <= lowest(wanted[0], max(level))


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_shares_are_checked(wrong: float) -> None:
    logits, labels = answers([0.9, 0.8], [True, True])
    with pytest.raises(ConfigError, match=r"wanted_error=.*above 0 and below 1"):
        threshold_for(logits, labels, wrong)
    with pytest.raises(ConfigError, match=r"confidence=.*above 0 and below 1"):
        threshold_for(logits, labels, 0.1, confidence=wrong)
