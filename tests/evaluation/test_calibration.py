"""Calibration: its fit and its figures."""

import dataclasses
import importlib
import json
import math
import warnings
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from torch import Tensor

from densely.errors import DataError, ShapeError
from densely.evaluation.calibration import (
    Calibration,
    calibration_score,
    fit,
    surest_first,
)

VECTOR = Calibration("vector", (2.0, 0.5), (-1.0, 0.25), "validation", 40, 0.02, 0.9)


def drawn(true_logits: Tensor, seed: int = 0) -> Tensor:
    """Labels whose probabilities are the softmax of `true_logits`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(true_logits.double().softmax(1), 1, generator=generator)[:, 0]


def outputs(images: int, classes: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(images, classes, generator=generator)


def nll(logits: Tensor, labels: Tensor) -> float:
    logits = logits.double()
    return float((logits.logsumexp(dim=1) - logits[range(len(labels)), labels]).mean())


def calibrated(calibration: Calibration, logits: Tensor) -> Tensor:
    return logits.double() * torch.tensor(calibration.scale, dtype=torch.float64) + torch.tensor(
        calibration.bias, dtype=torch.float64
    )


def nll_of_targets(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean NLL of classes that are true with probability (N + 1)/(N + 2), written out."""
    images, classes = logits.shape
    targets = torch.full((images, classes), 1 / ((images + 2) * (classes - 1))).double()
    targets[range(images), labels] = (images + 1) / (images + 2)
    return -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()


# Applying


def test_it_scales_and_shifts_each_class() -> None:
    logits = torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    expected = torch.tensor([[1.0, 1.25], [-7.0, 2.25]])
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        found = VECTOR.apply(logits.to(kind))
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    shares = VECTOR.probabilities(logits)
    assert shares.dtype == torch.float64  # as thresholds are chosen
    assert shares[0, 0].item() == pytest.approx(1 / (1 + math.exp(0.25)), rel=1e-12)
    assert torch.allclose(shares.sum(dim=1), torch.ones(2, dtype=torch.float64))


def test_none_leaves_logits_as_they_are() -> None:
    logits = outputs(5, 3)
    none = Calibration.none(3)
    assert torch.equal(none.apply(logits), logits)
    assert (none.method, none.images, none.fitted_on) == ("none", 0, "")


@pytest.mark.parametrize("shape", [(4, 1), (4, 3), (2,), (1, 4, 2)])
def test_logits_of_another_network_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"calibration is for \[images, 2\]"):
        VECTOR.apply(torch.zeros(shape))


# Fitting


def test_temperature_is_the_one_that_made_the_logits_too_sure() -> None:
    true_logits = outputs(20000, 5)
    found = fit(3.0 * true_logits, drawn(true_logits), "temperature", fitted_on="made up")
    assert found.scale == (found.scale[0],) * 5
    assert found.scale[0] == pytest.approx(1 / 3, rel=0.03)
    assert found.bias == (0.0,) * 5
    assert (found.method, found.fitted_on, found.images) == ("temperature", "made up", 20000)
    assert (found.wanted_error, found.threshold) == (None, None)


@pytest.mark.parametrize("factor", [0.2, 1.0, 4.0])
def test_temperature_is_the_best_of_all(factor: float) -> None:
    true_logits = outputs(200, 4).double()
    logits, labels = factor * true_logits, drawn(true_logits)
    searched = minimize_scalar(
        lambda t: nll_of_targets(logits / math.exp(t), labels).item(),
        bracket=(-0.1, 0.1),
        tol=1e-10,
    )
    found = fit(logits, labels, "temperature", fitted_on="")
    assert found.scale[0] == pytest.approx(math.exp(-searched.x), rel=1e-5)


def test_images_without_a_mistake_do_not_make_it_sure_of_all_others() -> None:
    """N of N right: the next one is right with probability (N + 1) / (N + 2), by Laplace's rule."""
    labels = torch.arange(40) % 4
    right = F.one_hot(labels, 4).double()
    found = fit(right, labels, "temperature", fitted_on="")
    assert found.probabilities(right).max().item() == pytest.approx(41 / 42, rel=1e-6)


def test_temperature_is_bounded() -> None:
    labels = torch.arange(40) % 4
    right = F.one_hot(labels, 4).double()
    wrong = right.roll(1, dims=1)
    assert fit(right / 100, labels, "temperature", fitted_on="").scale[0] == 20
    assert fit(wrong, labels, "temperature", fitted_on="").scale[0] == 0.05
    for method in ("temperature", "vector"):
        for logits in (right, 1e3 * right, wrong, 1e3 * wrong):
            either = fit(logits, labels, method, fitted_on="")  # type: ignore[arg-type]
            assert torch.isfinite(either.apply(logits)).all()
            assert max(either.scale) < 100


def test_logits_that_say_nothing_are_left_as_they_are() -> None:
    logits, labels = outputs(1, 3).repeat(3, 1).fill_(2.5), torch.tensor([0, 1, 2])
    assert fit(logits, labels, "temperature", fitted_on="").scale == (1.0, 1.0, 1.0)


def test_vector_scaling_undoes_what_was_done_to_each_class() -> None:
    true_logits = outputs(10000, 3)
    scale, bias = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, -1.0, 0.0])
    found = fit((true_logits - bias) / scale, drawn(true_logits), "vector", fitted_on="")
    assert found.scale == pytest.approx(scale.tolist(), rel=0.05)
    assert found.bias == pytest.approx(bias.tolist(), abs=0.1)


def test_vector_scaling_minimises_what_its_documentation_says() -> None:
    images, classes = 120, 4
    true_logits = outputs(images, classes)
    logits, labels = 2.0 * true_logits + torch.tensor([0.0, 1.0, 0.0, -1.0]), drawn(true_logits)
    temperature = 1 / fit(logits, labels, "temperature", fitted_on="").scale[0]
    found = fit(logits, labels, "vector", fitted_on="")
    scale = torch.tensor(found.scale, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(found.bias, dtype=torch.float64, requires_grad=True)
    loss = nll_of_targets(logits.double() * scale + bias, labels)
    loss = loss + ((scale * temperature - 1).square().sum() + bias.square().sum()) / (2 * images)
    loss.backward()
    assert scale.grad is not None
    assert bias.grad is not None
    # The pull alone has slopes of about 0.5 / 120 here.
    assert max(abs(b) for b in found.bias) > 0.5
    assert scale.grad.abs().max() < 2e-5
    assert bias.grad.abs().max() < 2e-5


def test_vector_scaling_survives_classes_that_are_rare_or_absent() -> None:
    """Without its pull the bias of an absent class has no bound."""
    true_logits = outputs(300, 10)
    true_logits[:, 8:] -= 8
    labels = drawn(true_logits)
    assert set(labels.tolist()) == set(range(8))
    fresh = outputs(2000, 10, seed=1)
    fresh[:, 8:] -= 8
    fresh_labels = drawn(fresh, seed=1)
    found = fit(2 * true_logits, labels, "vector", fitted_on="")
    assert max(abs(b) for b in found.bias) < 3
    assert all(0.25 < s < 1 for s in found.scale)
    assert nll(calibrated(found, 2 * fresh), fresh_labels) < nll(fresh, fresh_labels) + 0.05


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 30),
    classes=st.integers(2, 6),
    factor=st.sampled_from([0.01, 0.3, 1.0, 5.0, 50.0]),
    own=st.booleans(),
)
def test_no_fit_is_worse_than_none(
    seed: int, images: int, classes: int, factor: float, own: bool
) -> None:
    true_logits = outputs(images, classes, seed)
    labels = drawn(true_logits if own else true_logits.flip(1), seed)
    logits = factor * true_logits
    before = nll_of_targets(logits.double(), labels)
    temperature = fit(logits, labels, "temperature", fitted_on="")
    vector = fit(logits, labels, "vector", fitted_on="")
    cooled = nll_of_targets(calibrated(temperature, logits).double(), labels)
    assert cooled <= before + 1e-12
    assert nll_of_targets(calibrated(vector, logits).double(), labels) <= cooled + 1e-12
    assert 0.05 <= temperature.scale[0] <= 20


def test_the_same_images_give_the_same_fit() -> None:
    logits = outputs(50, 4)
    first, second = (fit(logits, drawn(logits), "vector", fitted_on="") for _ in range(2))
    assert first == second


def test_no_method_keeps_the_logits_and_says_where_from() -> None:
    found = fit(outputs(6, 3), drawn(outputs(6, 3)), "none", fitted_on="validation")
    assert found == dataclasses.replace(Calibration.none(3), fitted_on="validation", images=6)


@pytest.mark.parametrize(
    "logits", [torch.empty(0, 3), torch.full((3, 3), math.nan), -(1 / torch.eye(3) - 1)]
)
def test_what_cannot_be_fitted_to_is_refused(logits: Tensor) -> None:
    labels = torch.arange(len(logits))
    with pytest.raises(DataError, match="validation split: there are no images, or"):
        fit(logits, labels, "temperature", fitted_on="validation split")


# Judging


def bins_by_hand(confidence: list[float], right: list[float]) -> list[list[int]]:
    return [[i for i, c in enumerate(confidence) if b / 15 < c <= (b + 1) / 15] for b in range(15)]


def gap(group: list[int], confidence: list[float], right: list[float]) -> float:
    return abs(sum(confidence[i] for i in group) - sum(right[i] for i in group))


@pytest.mark.parametrize(("images", "classes"), [(400, 4), (7, 3), (100, 2)])
def test_figures_are_what_their_definitions_say(images: int, classes: int) -> None:
    logits = outputs(images, classes)
    labels = drawn(0.5 * logits)
    labels[labels == classes - 1] = 0  # a class that does not occur
    found = calibration_score("vector", logits, labels)
    shares = logits.double().exp() / logits.double().exp().sum(dim=1, keepdim=True)
    truth = torch.eye(classes, dtype=torch.float64)[labels]
    assert found.method == "vector"
    assert found.nll == pytest.approx(nll(logits, labels), rel=1e-12)
    assert found.brier == pytest.approx((shares - truth).square().sum(dim=1).mean().item())

    pairs = sorted(
        (max(row), float(row.index(max(row)) == label))
        for row, label in zip(shares.tolist(), labels.tolist(), strict=True)
    )
    confidence, right = map(list, zip(*pairs, strict=True))
    groups = bins_by_hand(confidence, right)
    assert found.ece == pytest.approx(sum(gap(g, confidence, right) for g in groups) / images)
    for group, shown, b in zip(groups, found.bins, range(15), strict=True):
        assert (shown.low, shown.high) == (pytest.approx(b / 15), pytest.approx((b + 1) / 15))
        assert shown.images == len(group)
        n = max(len(group), 1)
        assert shown.confidence == pytest.approx(sum(confidence[i] for i in group) / n)
        assert shown.accuracy == pytest.approx(sum(right[i] for i in group) / n)

    number = min(15, images)
    sizes = sorted((images // number + (b < images % number) for b in range(number)), reverse=True)
    total, start = 0.0, images
    for size in sizes:  # the larger bins are the surest ones
        total += gap(list(range(start - size, start)), confidence, right)
        start -= size
    assert start == 0
    assert found.adaptive_ece == pytest.approx(total / images)
    values = [found.nll, found.brier, found.ece, found.adaptive_ece]
    values += [x for b in found.bins for x in (b.low, b.high, b.confidence, b.accuracy)]
    assert {type(value) for value in values} == {float}
    assert {type(b.images) for b in found.bins} == {int}


def test_sure_mistakes_cost_all_that_they_cost() -> None:
    """scikit-learn's log_loss says 36 here, as it clips."""
    found = calibration_score("none", torch.tensor([[900.0, 0.0]]), torch.tensor([1]))
    assert found.nll == 900
    assert found.brier == 2
    assert found.ece == found.adaptive_ece == 1
    assert (found.bins[14].images, found.bins[14].confidence) == (1, 1)


@pytest.mark.parametrize(("classes", "place"), [(3, 4), (5, 2), (15, 0)])
def test_a_confidence_on_an_edge_is_the_last_of_the_bin_below(classes: int, place: int) -> None:
    found = calibration_score("none", torch.zeros(2, classes), torch.tensor([0, 1]))
    assert [b.images for b in found.bins] == [2 * (b == place) for b in range(15)]


def test_torchmetrics_agrees() -> None:
    peers.torchvision()  # torchmetrics imports it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            metrics = importlib.import_module("torchmetrics.functional.classification")
        except ModuleNotFoundError:
            pytest.skip("torchmetrics is not installed")
    logits = outputs(500, 6)
    labels = drawn(0.6 * logits)
    expected = metrics.multiclass_calibration_error(
        logits.double().softmax(dim=1), labels, num_classes=6, n_bins=15, norm="l1"
    )
    found = calibration_score("none", logits, labels)
    assert found.ece == pytest.approx(expected.item(), rel=1e-6)
    assert found.ece > 0.05


def test_scikit_learns_curve_agrees() -> None:
    logits = outputs(500, 6)
    labels = drawn(0.6 * logits)
    confidence, given_class = logits.double().softmax(dim=1).max(dim=1)
    accuracy, mean = calibration_curve(labels == given_class, confidence, n_bins=15)
    shown = [b for b in calibration_score("none", logits, labels).bins if b.images]
    assert [b.accuracy for b in shown] == pytest.approx(accuracy.tolist())
    assert [b.confidence for b in shown] == pytest.approx(mean.tolist())


def test_the_surest_come_first_and_equals_share_what_is_right() -> None:
    log = math.log
    logits = torch.tensor([[0.0, log(3)], [log(9), 0.0], [log(3), 0.0], [0.0, log(3)]])
    confidence, right = surest_first(logits, torch.tensor([1, 0, 1, 0]))
    assert confidence.tolist() == pytest.approx([0.9, 0.75, 0.75, 0.75])
    assert right.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(40)))
def test_the_order_of_images_does_not_matter(order: list[int]) -> None:
    logits = outputs(10, 3).repeat(4, 1)  # each confidence four times
    labels = drawn(outputs(40, 3))
    first, second = (
        calibration_score("none", logits[index], labels[index]) for index in (range(40), order)
    )
    assert second.adaptive_ece == pytest.approx(first.adaptive_ece, abs=1e-12)
    assert second.ece == pytest.approx(first.ece, abs=1e-12)


# Keeping


def test_it_is_read_as_it_was_written() -> None:
    values = json.loads(json.dumps(VECTOR.to_dict()))
    assert Calibration.from_dict(values) == VECTOR
    assert values["scale"] == [2.0, 0.5]
    none = Calibration.none(4)
    assert Calibration.from_dict(json.loads(json.dumps(none.to_dict()))) == none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "expected one of"),
        ({"method": ["vector"]}, "expected one of"),
        ({"method": "temperature"}, "one scale for all and no bias"),
        ({"method": "temperature", "scale": [2.0, 2.0]}, "one scale for all and no bias"),
        ({"method": "temperature", "scale": [2.0, 1.0], "bias": [0.0, 0.0]}, "one scale for all"),
        ({"method": "temperature", "scale": [0.0, 0.0], "bias": [0.0, 0.0]}, "not positive"),
        ({"method": "temperature", "scale": [-1.0, -1.0], "bias": [0.0, 0.0]}, "not positive"),
        ({"method": "none", "scale": [2.0, 2.0], "bias": [0.0, 0.0]}, "expected a scale of 1"),
        ({"scale": [2.0]}, "1 scales and 2 biases"),
        ({"scale": [], "bias": []}, "0 scales and 0 biases"),
        ({"scale": [2.0, math.nan]}, "scale=.*finite"),
        ({"bias": [2.0, math.inf]}, "bias=.*finite"),
        ({"scale": [2.0, "1"]}, "scale=.*finite"),
        ({"scale": [2.0, True]}, "scale=.*finite"),
        ({"scale": 2.0}, "expected a list"),
        ({"bias": "ab"}, "expected a list"),
        ({"fitted_on": 3}, "fitted_on=3"),
        ({"images": -1}, "images=-1"),
        ({"images": True}, "images=True"),
        ({"images": 3.0}, "images=3.0"),
        ({"wanted_error": 1.5}, "wanted_error=1.5"),
        ({"wanted_error": "0.1"}, "wanted_error='0.1'"),
        ({"wanted_error": None}, "wanted_error is missing"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"extra": 1}, "missing or unknown: extra"),
    ],
)
def test_damage_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration.from_dict(VECTOR.to_dict() | change)


def test_a_field_may_not_be_missing() -> None:
    values = VECTOR.to_dict()
    del values["bias"]
    with pytest.raises(ValueError, match="missing or unknown: bias"):
        Calibration.from_dict(values)


def test_a_wanted_error_may_be_out_of_reach() -> None:
    kept = dataclasses.replace(VECTOR, threshold=None)
    assert Calibration.from_dict(kept.to_dict()) == kept
