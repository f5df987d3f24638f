"""Probabilities that can be believed: their calibration, how good it is, and where it is kept.

    calibrated logits = logits * scale + bias        scale and bias: one for each class

    "temperature"   one scale, 1/T, and no bias: which class is likeliest does not change
    "vector"        a scale and a bias for each class

Logits and labels are such as `scores.check` lets pass.

Source: Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural Networks", section 4.2.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from densely.errors import DataError, RunError, ShapeError
from densely.evaluation.findings import CalibrationScore, Method, ReliabilityBin
from densely.whole_file import write_whole

BINS = 15

#: Bounds of 1/T.
INVERSE_TEMPERATURES = (0.05, 20.0)

#: Parts of the images that `cross_fitted` calibrates each by itself.
FOLDS = 5

#: Standard deviation of the normal prior of vector scaling: of each scale, as a share of the fitted
#: 1/T, and of each bias, in nats.
PRIOR_DEVIATION = 1.0


@dataclass(frozen=True)
class Calibration:
    """How logits become the logits whose softmax can be believed.

    Args:
        method: "none", "temperature" or "vector".
        scale: factor of each class's logit.
        bias: what is then added to it.
        fitted_on: what it was fitted on; empty where it was not.
        images: number of images that it was fitted on.
        wanted_error: largest share of wrong answers among those given; None where none was chosen.
        threshold: answers of at least this calibrated probability are given; None where none was
            chosen, or none keeps the promise.

    Raises:
        ValueError: a field is of another type, not finite, or does not fit the others.
    """

    method: Method
    scale: tuple[float, ...]
    bias: tuple[float, ...]
    fitted_on: str
    images: int
    wanted_error: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r}: expected one of {get_args(Method)}")
        for name in ("scale", "bias"):
            values = getattr(self, name)
            if not (isinstance(values, tuple) and all(_is_finite(value) for value in values)):
                raise ValueError(f"{name}={values!r}: expected finite floats")
        if not 0 < len(self.scale) == len(self.bias):
            raise ValueError(
                f"{len(self.scale)} scales and {len(self.bias)} biases: expected one "
                "of each for each class"
            )
        if self.method != "vector" and (len(set(self.scale)) > 1 or any(self.bias)):
            raise ValueError(f"method={self.method!r}: expected one scale for all and no bias")
        if self.method == "none" and self.scale[0] != 1:
            raise ValueError(f"method='none': expected a scale of 1, not {self.scale[0]}")
        if self.method == "temperature" and self.scale[0] <= 0:
            raise ValueError(f"method='temperature': a scale of {self.scale[0]} is not positive")
        if not isinstance(self.fitted_on, str):
            raise ValueError(f"fitted_on={self.fitted_on!r}: expected a string")
        if type(self.images) is not int or self.images < 0:
            raise ValueError(f"images={self.images!r}: expected a number of images")
        for name in ("wanted_error", "threshold"):
            value = getattr(self, name)
            if value is not None and not (_is_finite(value) and 0 <= value <= 1):
                raise ValueError(f"{name}={value!r}: expected a share from 0 to 1")
        if self.threshold is not None and self.wanted_error is None:
            raise ValueError(f"threshold={self.threshold}: its wanted_error is missing")

    @classmethod
    def none(cls, num_classes: int) -> "Calibration":
        """Leave logits as they are."""
        return cls("none", (1.0,) * num_classes, (0.0,) * num_classes, "", 0)

    def apply(self, logits: Tensor) -> Tensor:
        """Calibrated logits of logits [N, K]: float32 [N, K] on the same device.

        Raises:
            ShapeError: K is another number of classes.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.scale):
            raise ShapeError(
                f"logits of shape {list(logits.shape)}: the calibration is for "
                f"[images, {len(self.scale)}]"
            )
        scale = torch.tensor(self.scale, dtype=torch.float32, device=logits.device)
        bias = torch.tensor(self.bias, dtype=torch.float32, device=logits.device)
        return logits.float() * scale + bias

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities of logits [N, K]: float64 [N, K] on the same device.

        As thresholds are chosen: in float32 all that are within 3e-8 of 1 would be as sure.

        Raises:
            ShapeError: K is another number of classes.
        """
        return self.apply(logits).double().softmax(dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {"scale": list(self.scale), "bias": list(self.bias)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """Read what `to_dict` gave.

        Raises:
            ValueError: a field is missing, unknown, or as the class says.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            wrong = ", ".join(sorted(names ^ values.keys()))
            raise ValueError(f"missing or unknown: {wrong}")
        for name in ("scale", "bias"):
            if not isinstance(values[name], list):
                raise ValueError(f"{name}={values[name]!r}: expected a list")
        return cls(**values | {name: tuple(values[name]) for name in ("scale", "bias")})


def fit(logits: Tensor, labels: Tensor, method: Method, *, fitted_on: str) -> Calibration:
    """Fit a calibration to images that the network did not learn from.

    Both methods minimise the mean negative log-likelihood (NLL) in float64, of classes that are
    true with probability (N + 1)/(N + 2) and not with certainty: N images that are all answered
    rightly do not show that none ever will be wrong, and a likelihood that believed so would make
    the network ever surer. Neither gives a worse one than the logits as they are.

    Temperature: the likelihood is concave in 1/T, so that the zero of its slope is the best 1/T,
    held within `INVERSE_TEMPERATURES`.

    Vector: a few hundred images do not determine a scale and a bias for each class, and without
    bounds a class that does not occur among them gets a bias of minus infinity. So each has a
    normal prior, s_k ~ N(1/T, (PRIOR_DEVIATION/T)^2) and b_k ~ N(0, PRIOR_DEVIATION^2), with T of
    temperature scaling, and what is minimised is

        NLL + (sum_k (s_k T - 1)^2 + sum_k b_k^2) / (2 N PRIOR_DEVIATION^2),

    whose pull fades as the number of images N grows. It is strictly convex.

    Args:
        logits: float [N, K].
        labels: int64 [N].
        method: "none" leaves the logits as they are.
        fitted_on: what the images are, for the reader.

    Raises:
        DataError: there are no images, or logits are NaN or infinity.

    Source of the targets: Platt 1999, "Probabilistic Outputs for Support Vector Machines", section
    2.2, which is Laplace's rule of succession; the rest is shared by the other classes.
    """
    inputs, truth = logits.detach().cpu().double(), labels.cpu()
    if len(inputs) == 0 or not torch.isfinite(inputs).all():
        raise DataError(f"{fitted_on}: there are no images, or the network gives NaN or infinity")
    classes = inputs.shape[1]
    scale, bias = np.ones(classes), np.zeros(classes)
    if method != "none":
        scale *= _best_inverse_temperature(inputs, truth)
    if method == "vector":
        scale, bias = _best_vector(inputs, truth, scale[0])
    return Calibration(method, tuple(scale.tolist()), tuple(bias.tolist()), fitted_on, len(truth))


def cross_fitted(calibration: Calibration, logits: Tensor, labels: Tensor) -> Tensor:
    """Calibrated logits of the images that it was fitted to, as of new ones.

    Vector scaling has two numbers a class, and makes the very images that it is fitted to look
    surer and better answered than others: each fifth of them is calibrated by what is fitted to the
    rest. The single number of temperature scaling is left as it is.

    Args:
        calibration: as `fit` gave it for these.
        logits: float [N, K].
        labels: int64 [N].

    Returns:
        float32 [N, K] on the same device.
    """
    parts = min(FOLDS, len(labels))
    if calibration.method != "vector" or parts < 2:
        return calibration.apply(logits)
    inputs, truth = logits.detach().cpu().double(), labels.cpu()
    part = torch.empty(len(truth), dtype=torch.int64)
    part[truth.argsort(stable=True)] = torch.arange(len(truth)) % parts  # of each class as many
    found = torch.empty(inputs.shape, dtype=torch.float32)
    for i in range(parts):
        rest, own = part != i, part == i
        inverse_temperature = _best_inverse_temperature(inputs[rest], truth[rest])
        scale, bias = _best_vector(inputs[rest], truth[rest], inverse_temperature, calibration)
        fold = dataclasses.replace(
            calibration, scale=tuple(scale.tolist()), bias=tuple(bias.tolist())
        )
        found[own] = fold.apply(inputs[own])
    return found.to(logits.device)


def calibration_score(method: Method, logits: Tensor, labels: Tensor) -> CalibrationScore:
    """Judge probabilities: the softmax of calibrated logits.

    Calibration errors are of the likeliest class: the mean of |confidence - accuracy| over bins,
    weighted by their images (Guo et al. 2017, equation 3). Bins of equal width are those of Naeini,
    Cooper, Hauskrecht 2015; those of equal numbers of images those of Nguyen and O'Connor 2015
    and of Nixon et al. 2019.

    Args:
        method: how `logits` were calibrated.
        logits: float [N, K], calibrated.
        labels: int64 [N].
    """
    from sklearn.metrics import brier_score_loss

    outputs, truth = logits.detach().cpu().double(), labels.cpu()
    confidence, right = surest_first(outputs, truth)
    bins = _bins_of_equal_width(confidence, right)
    groups = np.array_split(np.arange(len(truth)), BINS)
    return CalibrationScore(
        method=method,
        # Not scikit-learn's log_loss, which clips probabilities: of sure mistakes it hides most.
        nll=_nll(outputs, truth),
        brier=float(
            brier_score_loss(
                truth.numpy(),
                outputs.softmax(dim=1).numpy(),
                labels=np.arange(outputs.shape[1]),
                scale_by_half=False,
            )
        ),
        ece=sum(abs(b.confidence - b.accuracy) * b.images for b in bins) / len(truth),
        adaptive_ece=float(sum(abs((confidence[g] - right[g]).sum()) for g in groups) / len(truth)),
        bins=bins,
    )


def surest_first(logits: Tensor, labels: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Confidence in the likeliest class and whether it is right, from the surest image on.

    Images of equal confidence share what is right: each counts as their mean, so that nothing
    depends on their order.

    Args:
        logits: float [N, K], calibrated.
        labels: int64 [N].

    Returns:
        Both [N]; confidence falls, and "right" is 0 or 1 where no other image is as sure.
    """
    probabilities = logits.detach().cpu().double().softmax(dim=1)
    top = probabilities.max(dim=1)
    confidence = top.values.numpy()
    right = (top.indices == labels.cpu()).numpy()
    levels, level, images = np.unique(-confidence, return_inverse=True, return_counts=True)
    shares = np.bincount(level, weights=right) / images
    return -np.repeat(levels, images), np.repeat(shares, images)


def save_calibration(folder: Path, calibration: Calibration, digest: str) -> None:
    """Write `calibration.json` beside the weights of a checkpoint, with the weights' digest.

    Args:
        folder: as `find_checkpoint` gives it.
        calibration: of those weights.
        digest: of the weights that it was fitted for, as `weights_digest` gave it.

    Raises:
        RunError: other weights are there now, or none.
        OSError: the file cannot be written.
    """
    if weights_digest(folder) != digest:
        raise RunError(
            f"{folder}: other weights are there than those that were judged, as the run has gone "
            "on; evaluate it again"
        )
    text = json.dumps({"weights_digest": digest, "calibration": calibration.to_dict()}, indent=2)
    write_whole(folder / "calibration.json", text + "\n")


def load_calibration(folder: Path, digest: str, num_classes: int) -> Calibration | None:
    """Read the calibration of a checkpoint; None where there is none for its weights.

    Args:
        folder: as `find_checkpoint` gives it.
        digest: of the weights, as `weights_digest` gave it.
        num_classes: of the network.

    Raises:
        RunError: it is damaged.
    """
    path = folder / "calibration.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        fitted_for, fields = values["weights_digest"], values["calibration"]
        calibration = Calibration.from_dict(fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path}: damaged or of another version ({error}); delete it, and densely evaluate "
            "fits another"
        ) from error
    if fitted_for != digest:  # a run that went on has other weights
        return None
    if len(calibration.scale) != num_classes:
        raise RunError(
            f"{path}: damaged: it is for {len(calibration.scale)} classes, and the network has "
            f"{num_classes}; delete it, and densely evaluate fits another"
        )
    return calibration


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def weights_digest(folder: Path) -> str:
    """Short name of the weights in a checkpoint's folder: others have another.

    Raises:
        RunError: there are none.
    """
    path = folder / "model.safetensors"
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise RunError(f"{path}: missing or not to be read: {error}") from error


def _nll(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> float:
    return F.cross_entropy(logits, labels, label_smoothing=smoothing).item()


def _smoothing(logits: Tensor) -> float:
    """Share of a target that is spread over all classes, so that 1/(N + 2) goes to the others."""
    images, classes = logits.shape
    return classes / ((classes - 1) * (images + 2)) if classes > 1 else 0.0


def _best_inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    from scipy.optimize import brentq

    share = _smoothing(logits)
    true = logits.gather(1, labels[:, None]).mean()
    target_logits = (1 - share) * true + share * logits.mean()

    def slope(inverse: float) -> float:
        """Derivative of the NLL by 1/T, which only rises: mean of E[logit] - targets' logit."""
        expected = (logits * (logits * inverse).softmax(dim=1)).sum(dim=1).mean()
        return float(expected - target_logits)

    low, high = INVERSE_TEMPERATURES
    if slope(low) >= 0:
        best = low
    elif slope(high) <= 0:
        best = high
    else:
        best = float(brentq(slope, low, high))
    # Equal where no temperature matters, as all logits of an image are equal.
    return best if _nll(logits * best, labels, share) < _nll(logits, labels, share) else 1.0


def _best_vector(
    logits: Tensor,
    labels: Tensor,
    inverse_temperature: float,
    near: Calibration | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and bias of each class; sooner where a calibration is known that is nearly theirs."""
    from scipy.optimize import minimize

    images, classes = logits.shape
    scaled = logits * inverse_temperature
    rows, share = torch.arange(images), _smoothing(logits)
    pull = 1 / (2 * images * PRIOR_DEVIATION**2)
    # The likelihood is steep in scales of large logits: in these units half the steps do.
    unit = np.concatenate([1 / np.sqrt(1 + scaled.square().mean(dim=0).numpy()), np.ones(classes)])

    def objective(place: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Value and gradient at scales 1/T * (1 + change[:K]) and biases change[K:]."""
        change = place * unit
        factor, bias = torch.from_numpy(change).reshape(2, classes)
        logarithms = (scaled * (1 + factor) + bias).log_softmax(dim=1)
        likelihood = (1 - share) * logarithms[rows, labels].mean() + share * logarithms.mean()
        value = -float(likelihood) + pull * float(change @ change)
        error = logarithms.exp_().sub_(share / classes)
        error[rows, labels] -= 1 - share
        slope = torch.cat([(error * scaled).sum(dim=0), error.sum(dim=0)]).numpy()
        return value, (slope / images + 2 * pull * change) * unit

    start = np.zeros(2 * classes)
    if near is not None:
        factors = np.array(near.scale) / inverse_temperature - 1
        start = np.concatenate([factors, near.bias]) / unit
    found = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1000, "gtol": 1e-6, "ftol": 1e-11},
    )
    factor, bias = (found.x * unit).reshape(2, classes)
    return inverse_temperature * (1 + factor), bias


def _bins_of_equal_width(
    confidence: NDArray[np.float64], right: NDArray[np.float64]
) -> tuple[ReliabilityBin, ...]:
    edges = np.linspace(0, 1, BINS + 1)
    place = np.digitize(confidence, edges[1:-1], right=True)
    images = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, values, minlength=BINS) for values in (confidence, right)]
    means = [(total / np.maximum(images, 1)).tolist() for total in sums]
    ends = edges.tolist()
    return tuple(
        ReliabilityBin(*values)
        for values in zip(ends[:-1], ends[1:], images.tolist(), *means, strict=True)
    )
