"""Which answers to give: how wrong a network still is on the images that it is surest of.

An image is answered if the calibrated probability of its likeliest class is at least a threshold.
Logits and labels are such as `scores.check` lets pass.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from densely.errors import ConfigError
from densely.evaluation.calibration import surest_first
from densely.evaluation.findings import Choice, RiskCoverage

CURVE_POINTS = 500


def risk_coverage(
    logits_calibrated: Tensor, labels: Tensor, choices: Sequence[tuple[float, float | None]]
) -> RiskCoverage:
    """Share of wrong answers (risk) by share of images answered (coverage), surest first.

    The curve has a point for each confidence that occurs, thinned to `CURVE_POINTS`: images of
    equal confidence are answered together. The area is the mean of the risks at coverages 1/N, 2/N
    ... 1 (Geifman, Uziel, El-Yaniv 2019, AURC); images of equal confidence enter it as on average
    over their orders.

    Args:
        logits_calibrated: float [N, K].
        labels: int64 [N].
        choices: wanted errors, each with its threshold, which is None where there is none;
            coverage and error are those of the images given.
    """
    confidence, right = surest_first(logits_calibrated, labels)
    images = len(confidence)
    answered = np.arange(1, images + 1)
    wrong = np.cumsum(1 - right)
    lasts = np.append((np.diff(confidence) < 0).nonzero()[0], images - 1)
    shown = np.linspace(0, len(lasts) - 1, min(len(lasts), CURVE_POINTS)).round().astype(int)
    points = lasts[shown]
    judged = []
    for wanted_error, threshold in choices:
        given = 0 if threshold is None else int((confidence >= threshold).sum())
        error = round(wrong[given - 1]) / given if given else None
        judged.append(Choice(wanted_error, threshold, given / images, error))
    return RiskCoverage(
        coverage=tuple((answered[points] / images).tolist()),
        # Whole numbers, but for rounding: after the last of equals no share is left open.
        risk=tuple((wrong[points].round() / answered[points]).tolist()),
        area=float((wrong / answered).mean()),
        choices=tuple(judged),
    )


def threshold_for(
    logits_calibrated: Tensor, labels: Tensor, wanted_error: float, confidence: float = 0.95
) -> float | None:
    """Lowest threshold found that keeps the error among answers below `wanted_error`.

    With probability `confidence` over the images given, the true error on answered images of the
    same kind is below `wanted_error`. The threshold that answers all images, and each of the
    ceil(log2 N) thresholds of a binary search, are held against `risk_bound`, at an equal part of
    1 - `confidence`.

    Args:
        logits_calibrated: float [N, K], of images that the network did not learn from; strictly,
            its calibration neither.
        labels: int64 [N].
        wanted_error: above 0 and below 1.
        confidence: above 0 and below 1.

    Returns:
        None where no threshold of the search keeps the promise.

    Raises:
        ConfigError: `wanted_error` or `confidence` is out of range.

    Source: Geifman and El-Yaniv 2017, "Selective Classification for Deep Neural Networks",
    algorithm 1 (SGR) and lemma 3.1. It gives the last threshold that it tries; here it is the last
    that passed. And it begins with half of the images, which may be too few to show anything where
    all of them are enough: so all come first here.
    """
    for name, value in (("wanted_error", wanted_error), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(f"{name}={value}: expected a share above 0 and below 1")
    sureness, right = surest_first(logits_calibrated, labels)
    images = len(sureness)
    wrong = np.cumsum(1 - right)
    rising = sureness[::-1]
    rounds = math.ceil(math.log2(images))
    share = (1 - confidence) / (rounds + 1)
    if risk_bound(round(wrong[-1]), images, share) < wanted_error:
        return float(rising[0])
    found = None
    low, high = 1, images  # places among the images from the least sure on, counted from 1
    for _ in range(rounds):
        place = math.ceil((low + high) / 2)
        threshold = float(rising[place - 1])
        answered = int((sureness >= threshold).sum())
        errors = round(wrong[answered - 1])
        if risk_bound(errors, answered, share) < wanted_error:
            found, high = threshold, place
        else:
            low = place
    return found


def risk_bound(errors: int, answered: int, delta: float) -> float:
    """Bound of the true error that holds with probability 1 - `delta`: Clopper and Pearson 1934.

    It is the error under which `errors` wrong answers or fewer, of `answered`, have the probability
    `delta`.
    """
    from scipy.special import betaincinv

    if errors == answered:
        return 1.0
    return float(betaincinv(errors + 1, answered - errors, 1 - delta))
