"""What an evaluation finds: plain values that are computed once, written as JSON and drawn.

Findings
├── Scores            how often it is right, as a whole and class by class
├── CalibrationScore  whether its probabilities can be believed, before and after calibration
├── RiskCoverage      how wrong it still is on the images that it is surest of
│   └── Choice        the confidence from which on an error is as small as wanted
├── Example           images worth a look, with heat maps
└── Cost              parameters, multiplications, memory, speed on this machine
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["none", "temperature", "vector"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassScore:
    """How a network does on one class; without images of it, nobody knows.

    Args:
        name: of the class.
        support: images of it.
        precision: share of those called so that are so; 0 where none was called so, None where
            there are none of it.
        recall: share of those that are so that were called so; None where there are none.
        f1: harmonic mean of both; None where there are none.
        auroc: area under the receiver operating characteristic, one class against the rest; None
            where all images or none are of it.
        average_precision: area under the precision-recall steps; None as for `auroc`.
    """

    name: str
    support: int
    precision: float | None
    recall: float | None
    f1: float | None
    auroc: float | None
    average_precision: float | None


@dataclass(frozen=True)
class Scores:
    """How often a network is right.

    Args:
        images: number of images.
        accuracy: share whose likeliest class is right, with Wilson's interval; of several labels
            an image, share of images with all labels right.
        top5_accuracy: share whose class is among the five likeliest, with Wilson's interval; None
            for five classes and fewer, and for several labels an image.
        balanced_accuracy: mean recall over the classes that occur, with a bootstrap interval; None
            for several labels an image.
        macro_f1: mean F1 over the classes that occur, with a bootstrap interval.
        auroc: mean over the classes that have one.
        average_precision: mean over the classes that have one.
        classes: one each, in the network's order.
        confusion: int64 [K, K]; row: the true class, column: the class given. None for several
            labels an image.
    """

    images: int
    accuracy: Interval
    top5_accuracy: Interval | None
    balanced_accuracy: Interval | None
    macro_f1: Interval
    auroc: float | None
    average_precision: float | None
    classes: tuple[ClassScore, ...]
    confusion: NDArray[np.int64] | None


@dataclass(frozen=True)
class ReliabilityBin:
    """Images whose confidence lies in (low, high]: their mean confidence, and how many are right.

    `confidence` and `accuracy` are 0 where `images` is.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class CalibrationScore:
    """Whether probabilities can be believed.

    Args:
        method: how they were calibrated.
        nll: mean negative logarithm of the true class's probability, in nats.
        brier: mean squared distance of all probabilities from the truth, from 0 to 2.
        ece: expected calibration error over 15 bins of equal width.
        adaptive_ece: the same over 15 bins of equal numbers of images.
        bins: those of equal width, for the reliability diagram.
    """

    method: Method
    nll: float
    brier: float
    ece: float
    adaptive_ece: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Choice:
    """The confidence from which on the error is as small as wanted.

    The threshold is chosen on one split; the other two figures are those of the images judged.

    Args:
        wanted_error: largest share of wrong answers among those given.
        threshold: answers of at least this confidence are given; None where no threshold was found
            that keeps the promise.
        coverage: share of the images that then get an answer.
        error: share of wrong ones among these; None where no image gets an answer.
    """

    wanted_error: float
    threshold: float | None
    coverage: float
    error: float | None


@dataclass(frozen=True)
class RiskCoverage:
    """Share of wrong answers among the images that the network is surest of.

    Args:
        coverage: shares of the images that get an answer, rising to 1.
        risk: share of wrong ones among these.
        area: mean risk over all coverages (AURC); smaller is better.
        choices: thresholds for some wanted errors.
    """

    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    area: float
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Example:
    """An image worth a look.

    Args:
        index: its place in the split that was judged.
        file: from the data folder on; None for data sets without files.
        label: its class, as the data have it.
        given: the class that the network gives it.
        confidence: calibrated probability of `given`.
        label_probability: calibrated probability of `label`.
        pixels: uint8 [C, H, W], as the data set has it.
        heat_map: float32 [h, w] class activation map for `given`; None where the network has none.
    """

    index: int
    file: str | None
    label: str
    given: str
    confidence: float
    label_probability: float
    pixels: NDArray[np.uint8]
    heat_map: NDArray[np.float32] | None


@dataclass(frozen=True)
class Cost:
    """What a network costs on this machine.

    Args:
        model: name of the network.
        parameters: number of weights.
        macs: multiplications with addition of one image's forward pass.
        weights_bytes: memory of parameters and buffers.
        kept_bytes: what a training step keeps for its backward pass, an image.
        images_per_s: inference speed by batch size, medians.
        train_batch: images of a training step that was timed; 0 where none fits into memory.
        train_images_per_s: speed of such steps.
        device: name of the processor or GPU.
        precision: "float32" or "bfloat16".
    """

    model: str
    parameters: int
    macs: int
    weights_bytes: int
    kept_bytes: int
    images_per_s: dict[int, float]
    train_batch: int
    train_images_per_s: float
    device: str
    precision: str


@dataclass(frozen=True)
class Findings:
    """All that an evaluation finds.

    Args:
        run: the run directory, as it was named.
        data: what it was judged on.
        date: day of the evaluation, ISO 8601.
        warnings: what the reader must know, a sentence each.
        scores: of the classes that are likeliest after the calibration by `method`.
        method: the calibration that the examples show.
        calibrated_on: the split that calibration and thresholds were fitted on, with its number of
            images; None where nothing was fitted.
        is_stored: whether that calibration is stored with the model.
        wanted_error: of the threshold that is stored with it; None where there is none.
        calibration: before it ("none") and after each method.
        selective: which answers to give.
        mistakes: the most confident wrong answers, most confident first.
        unsure: the least confident right answers, least confident first.
        label_errors: images whose label may be wrong, likeliest first.
        cost: of the network here.
    """

    run: str
    data: str
    date: str
    warnings: tuple[str, ...]
    scores: Scores
    method: Method
    calibrated_on: str | None
    is_stored: bool
    wanted_error: float | None
    calibration: tuple[CalibrationScore, ...]
    selective: RiskCoverage
    mistakes: tuple[Example, ...]
    unsure: tuple[Example, ...]
    label_errors: tuple[Example, ...]
    cost: Cost

    @property
    def before(self) -> CalibrationScore:
        """Without calibration."""
        return self._score("none")

    @property
    def after(self) -> CalibrationScore:
        """With the calibration by `method`; the same as `before` where that is "none"."""
        return self._score(self.method)

    @property
    def choice(self) -> Choice | None:
        """That of the wanted error."""
        choices = self.selective.choices
        return next((c for c in choices if c.wanted_error == self.wanted_error), None)

    def _score(self, method: Method) -> CalibrationScore:
        return next(score for score in self.calibration if score.method == method)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; pixels and heat maps are left out."""
        values = dataclasses.asdict(self)
        for group in ("mistakes", "unsure", "label_errors"):
            for example in values[group]:
                del example["pixels"], example["heat_map"]
        if self.scores.confusion is not None:
            values["scores"]["confusion"] = self.scores.confusion.tolist()
        return values
