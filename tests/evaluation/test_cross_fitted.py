"""Calibrated logits as of new images: what thresholds are chosen by."""

import pytest
import torch
from torch import Tensor

from densely.evaluation.calibration import cross_fitted, fit
from densely.evaluation.selective import threshold_for


def drawn(images: int, classes: int, edge: float, seed: int) -> tuple[Tensor, Tensor]:
    """Logits that are three times too sure, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += edge
    return 3 * logits, labels


def test_each_fifth_is_calibrated_by_the_rest() -> None:
    logits, labels = drawn(103, 4, 1.0, 0)
    found = cross_fitted(fit(logits, labels, "vector", fitted_on="x"), logits, labels)
    order = sorted(range(103), key=lambda i: (int(labels[i]), i))
    for part in range(5):
        own = order[part::5]
        rest = sorted({*range(103)} - {*own})
        calibration = fit(logits[rest], labels[rest], "vector", fitted_on="x")
        torch.testing.assert_close(found[own], calibration.apply(logits[own]), rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", ["none", "temperature"])
def test_a_single_number_is_that_of_all(method: str) -> None:
    logits, labels = drawn(50, 4, 1.0, 0)
    calibration = fit(logits, labels, method, fitted_on="x")  # type: ignore[arg-type]
    assert torch.equal(cross_fitted(calibration, logits, labels), calibration.apply(logits))


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_few_images_are_enough(images: int) -> None:
    logits, labels = drawn(images, 3, 1.0, 0)
    calibration = fit(logits, labels, "vector", fitted_on="x")
    found = cross_fitted(calibration, logits, labels)
    assert found.shape == logits.shape
    assert found.isfinite().all()


def test_the_threshold_keeps_its_promise_though_a_hundred_numbers_are_fitted() -> None:
    """By what they themselves are fitted to it is broken in most of these draws."""
    broken = {"cross-fitted": 0, "as fitted": 0}
    for seed in range(8):
        logits, labels = drawn(300, 50, 3.5, seed)
        new, truth = drawn(20_000, 50, 3.5, 100 + seed)
        calibration = fit(logits, labels, "vector", fitted_on="x")
        sure, given = calibration.probabilities(new).max(dim=1)
        for name, calibrated in (
            ("cross-fitted", cross_fitted(calibration, logits, labels)),
            ("as fitted", calibration.apply(logits)),
        ):
            threshold = threshold_for(calibrated, labels, 0.1)
            assert threshold is not None
            broken[name] += bool((given != truth)[sure >= threshold].double().mean() > 0.1)
    assert broken["cross-fitted"] <= 1
    assert broken["as fitted"] >= 3
