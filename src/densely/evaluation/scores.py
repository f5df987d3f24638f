"""How often a network is right, as a whole and class by class, with confidence intervals."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densely.errors import DataError
from densely.evaluation.findings import ClassScore, Interval, Scores

CONFIDENCE = 0.95
RESAMPLES = 1000

Counts = NDArray[np.int64]


def check_logits(logits: Tensor, classes: tuple[str, ...]) -> None:
    """Let pass what a network may say of images.

    Args:
        logits: float [N, K].
        classes: names of the K classes.

    Raises:
        DataError: there are no images, the shape does not fit, or a logit is NaN or infinity.
    """
    if logits.ndim != 2 or logits.shape[1] != len(classes):
        raise DataError(
            f"the network gives the shape {list(logits.shape)}: expected [images, {len(classes)}], "
            "one column for each class"
        )
    images = len(logits)
    if images == 0:
        raise DataError("there are no images to judge: name a split or a folder that has some")
    bad = ~torch.isfinite(logits).all(dim=1)
    if bad.any():
        raise DataError(
            f"the network gives NaN or infinity for {int(bad.sum())} of {images} images, the first "
            f"is image {_first(bad)}: its training may have diverged; where it was judged in "
            "bfloat16, float32 may do"
        )


def check(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
    """Let pass what can be judged class by class.

    Args:
        logits: float [N, K].
        labels: int64 [N], indices into `classes`; or 0 and 1 [N, K], of several labels an image.
        classes: names of the K classes.

    Raises:
        DataError: as `check_logits`; or shapes do not fit, a label is none of the classes, or all
            are the same one.
    """
    check_logits(logits, classes)
    if labels.shape not in (logits.shape[:1], logits.shape):
        raise DataError(
            f"labels have the shape {list(labels.shape)}: expected [{len(logits)}], or "
            f"{list(logits.shape)} for several labels an image"
        )
    if labels.ndim == 2:
        odd = ((labels != 0) & (labels != 1)).any(dim=1)
        if odd.any():
            raise DataError(f"the labels of image {_first(odd)} are not all 0 or 1")
        if not labels.any():
            raise DataError("no image has a label: what a network finds shows on some that have")
        return
    if labels.dtype != torch.int64:
        raise DataError(f"labels are of type {labels.dtype}: expected int64")
    odd = (labels < 0) | (labels >= len(classes))
    if odd.any():
        raise DataError(
            f"image {_first(odd)} has the label {int(labels[_first(odd)])}: expected 0 to "
            f"{len(classes) - 1}, as there are {len(classes)} classes"
        )
    if bool((labels == labels[0]).all()):
        raise DataError(
            f"one class only, '{classes[int(labels[0])]}': what a network confuses shows on images "
            "of two classes and more; densely evaluate --no-report gives the accuracy on one"
        )


def scores_of(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Scores:
    """Judge a network by its likeliest classes.

    AUROC and average precision of a class rank the images by its probability, softmax of `logits`;
    of classes that are equally likely the first counts as the likelier.
    Balanced accuracy and macro F1 are functions of the confusion matrix, so that matrices are
    drawn from it, and not images (Efron and Tibshirani 1993, chapter 13: percentile intervals).

    Args:
        logits: float [N, K].
        labels: int64 [N].
        classes: names of the K classes.

    Raises:
        DataError: as `check` says.
    """
    from sklearn.metrics import (
        accuracy_score,
        confusion_matrix,
        precision_recall_fscore_support,
    )

    if labels.ndim != 1:
        raise DataError(f"labels have the shape {list(labels.shape)}: expected [{len(logits)}]")
    check(logits, labels, classes)
    outputs = logits.detach().cpu().double()
    truth = labels.cpu().numpy()
    likeliest = outputs.sort(dim=1, descending=True, stable=True).indices[:, :5].numpy()
    given = likeliest[:, 0]
    every = np.arange(len(classes))
    confusion = confusion_matrix(truth, given, labels=every)
    rates = np.array(
        precision_recall_fscore_support(truth, given, labels=every, average=None, zero_division=0)
    )
    found = _class_scores(classes, rates, _log_odds(outputs).numpy(), truth[:, None] == every)
    resamples = list(_redrawn_confusions(confusion))
    top5 = None
    if len(classes) > 5:
        top5 = wilson_share((likeliest == truth[:, None]).sum(), len(truth))
    accuracy = wilson_share(accuracy_score(truth, given, normalize=False), len(truth))
    return Scores(
        images=len(truth),
        accuracy=accuracy,
        top5_accuracy=top5,
        balanced_accuracy=_interval(
            [score.recall for score in found if score.recall is not None],
            [_mean_recall(hits, support) for hits, _, support in resamples],
            len(truth),
        ),
        macro_f1=_macro_f1_interval(found, resamples, len(truth)),
        auroc=_mean([score.auroc for score in found]),
        average_precision=_mean([score.average_precision for score in found]),
        classes=found,
        confusion=confusion,
    )


def multilabel_scores(logits: Tensor, targets: Tensor, classes: tuple[str, ...]) -> Scores:
    """Judge a network that gives an image all classes whose sigmoid is at least 0.5.

    Args:
        logits: float [N, K]; arrays are taken too.
        targets: bool, or 0 and 1 [N, K].
        classes: names of the K classes.

    Raises:
        DataError: shapes do not fit; there are no images; a logit is NaN or infinity; a target is
            neither 0 nor 1, or none is 1.
    """
    from sklearn.metrics import precision_recall_fscore_support

    logits, targets = torch.as_tensor(logits), torch.as_tensor(targets)
    if targets.ndim != 2:
        raise DataError(
            f"targets have the shape {list(targets.shape)}: expected [images, {len(classes)}]"
        )
    check(logits, targets, classes)
    outputs = logits.detach().cpu().double().numpy()
    truth = targets.cpu().numpy() != 0
    given = outputs >= 0  # where the sigmoid is at least 0.5
    # Class by class: a single column scikit-learn would take for two classes.
    rates = [
        precision_recall_fscore_support(so, called, labels=[True], average=None, zero_division=0)
        for so, called in zip(truth.T, given.T, strict=True)
    ]
    # The sigmoid keeps the order of logits, which do not run into 0 and 1.
    found = _class_scores(classes, np.array(rates)[:, :, 0].T, outputs, truth)
    accuracy = wilson_share((truth == given).all(axis=1).sum(), len(truth))
    return Scores(
        images=len(truth),
        accuracy=accuracy,
        top5_accuracy=None,
        balanced_accuracy=None,
        macro_f1=_macro_f1_interval(found, _redrawn_images(truth, given), len(truth)),
        auroc=_mean([score.auroc for score in found]),
        average_precision=_mean([score.average_precision for score in found]),
        classes=found,
        confusion=None,
    )


def _log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of each class's probability: its order, without running into 0 and 1."""
    top = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_p = logits.log_softmax(dim=1)
    odds = log_p - torch.log1p(-log_p.exp())  # exact up to p = 0.5
    return odds.scatter(1, top, logits.gather(1, top) - others)


def _first(chosen: Tensor) -> int:
    return int(chosen.nonzero()[0])


def _class_scores(
    classes: tuple[str, ...],
    rates: NDArray[np.float64],
    outputs: NDArray[np.float64],
    truth: NDArray[np.bool_],
) -> tuple[ClassScore, ...]:
    """Scores of each class.

    Args:
        classes: K names.
        rates: [4, K]: precision, recall, F1, support.
        outputs: [N, K], by which a class's images are ranked.
        truth: [N, K], whether an image is of a class.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    found = []
    for k, name in enumerate(classes):
        *means, support = rates[:, k].tolist()
        precision, recall, f1 = means if support else (None, None, None)
        auroc = average_precision = None
        if 0 < support < len(truth):
            auroc = float(roc_auc_score(truth[:, k], outputs[:, k]))
            average_precision = float(average_precision_score(truth[:, k], outputs[:, k]))
        found.append(
            ClassScore(name, int(support), precision, recall, f1, auroc, average_precision)
        )
    return tuple(found)


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def wilson_share(hits: int, images: int) -> Interval:
    """A share with Wilson's interval (1927), which holds for few images and near 0 and 1."""
    from scipy.stats import binomtest

    wilson = binomtest(int(hits), images).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(int(hits) / images, float(wilson.low), float(wilson.high))


def _redrawn_confusions(confusion: Counts) -> Iterator[tuple[Counts, Counts, Counts]]:
    """Of each resample and class: images called so that are so; called so; that are so.

    To draw N images with replacement and to count them is to draw the counts from a multinomial.
    """
    rows, columns = confusion.nonzero()  # of a thousand classes nearly all cells are empty
    cells = confusion[rows, columns]
    generator = np.random.default_rng(0)
    classes = len(confusion)
    for _ in range(RESAMPLES):
        drawn = generator.multinomial(cells.sum(), cells / cells.sum())
        counts = (
            np.bincount(rows, weights=drawn * (rows == columns), minlength=classes),
            np.bincount(columns, weights=drawn, minlength=classes),
            np.bincount(rows, weights=drawn, minlength=classes),
        )
        hits, called, support = (values.astype(np.int64) for values in counts)
        yield hits, called, support


def _redrawn_images(
    truth: NDArray[np.bool_], given: NDArray[np.bool_]
) -> Iterator[tuple[Counts, Counts, Counts]]:
    """As `_redrawn_confusions`, of several labels an image: bool [N, K]."""
    images = len(truth)
    counted = np.stack([truth & given, given, truth]).astype(np.float64)
    generator = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        drawn = generator.integers(images, size=images)
        times = np.bincount(drawn, minlength=images).astype(np.float64)
        hits, called, support = (times @ counted).astype(np.int64)
        yield hits, called, support


def _mean_recall(hits: Counts, support: Counts) -> float:
    """Mean over the classes that occur."""
    return float(np.mean(hits[support > 0] / support[support > 0]))


def _macro_f1(hits: Counts, called: Counts, support: Counts) -> float:
    """Mean over classes; 0 for one that a resample neither has nor gives."""
    return float(np.mean(2 * hits / np.maximum(called + support, 1)))


def _macro_f1_interval(
    found: tuple[ClassScore, ...],
    resamples: Iterable[tuple[Counts, Counts, Counts]],
    images: int,
) -> Interval:
    """Over the classes that occur, in every resample the same ones."""
    there = np.array([score.support > 0 for score in found])
    resampled = [_macro_f1(*(counts[there] for counts in drawn)) for drawn in resamples]
    return _interval([score.f1 for score in found if score.f1 is not None], resampled, images)


def _interval(of_classes: list[float], resampled: list[float], images: int) -> Interval:
    """Mean over classes; percentiles of its resamples, moved so that their mean is that value.

    Where classes have a handful of images, resamples miss some of them, and their F1 lies below
    the estimate as a whole: not moved, the interval would not hold what it is the interval of.
    Where a mean is 1 or 0 resamples are too, and say nothing of what might have been: the interval
    is that of a share of as many images, all or none.
    """
    value = float(np.mean(of_classes))
    if value in (0, 1):
        return wilson_share(int(value) * images, images)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail]) + value - np.mean(resampled)
    return Interval(value, min(max(float(low), 0.0), value), max(min(float(high), 1.0), value))
