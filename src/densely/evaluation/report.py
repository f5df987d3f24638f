"""The whole story of a run: judged, calibrated, explained, weighed, and written as a page.

What is fitted, calibration and the threshold of a wanted error, is fitted on the validation split;
what is shown is measured on the split that is judged.
"""

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densely.data import ImageSet, Splits
from densely.errors import ConfigError, DenselyError, RunError
from densely.evaluation.calibration import (
    Calibration,
    calibration_score,
    cross_fitted,
    fit,
    save_calibration,
)
from densely.evaluation.cost import costs
from densely.evaluation.evaluate import Evaluation, evaluation_of
from densely.evaluation.findings import Example, Findings, Method, Scores
from densely.evaluation.heat_maps import explain
from densely.evaluation.judged import Judged, fitting_images, judge, own_splits, seen
from densely.evaluation.label_errors import likely_label_errors
from densely.evaluation.overlay import tile
from densely.evaluation.report_page import check_replaceable, write_report
from densely.evaluation.scores import check, scores_of
from densely.evaluation.selective import risk_coverage, threshold_for
from densely.runtime import MemoryFormat, Precision
from densely.training.checkpoint import find_checkpoint
from densely.training.config import Split
from densely.training.run import RunDirectory

METHODS: tuple[Method, ...] = get_args(Method)
WANTED_ERRORS = (0.01, 0.02, 0.05, 0.1)
EXAMPLES = 24
#: A calibration that is fitted on fewer images may be worse than none.
FEW_IMAGES = 300
#: More classes than these are not named in a warning.
CLASSES_NAMED = 5


@dataclass(frozen=True)
class Report:
    """What was found, and the page that shows it.

    `evaluation` is that of the network alone, as `evaluate` gives it; `findings` are calibrated.
    """

    evaluation: Evaluation
    findings: Findings
    page: Path


def report(
    run: str | os.PathLike[str],
    data: str | None = None,
    *,
    split: Split = "test",
    data_dir: str | None = None,
    calibration: Method | None = None,
    wanted_error: float | None = None,
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    memory_format: MemoryFormat = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Judge a run, calibrate it, and write `report/` into it: report.html and metrics.json.

    The calibration and the threshold are stored with the model; `predict` applies them.

    Args:
        run: a run directory.
        data: as for `evaluate`.
        split: as for `evaluate`.
        data_dir: as for `evaluate`.
        calibration: the method to store, "temperature", "vector" or "none"; the page compares them.
            None for the one that is stored with these weights, "temperature" where none is.
        wanted_error: share of wrong answers that is acceptable among those that `predict` is sure
            of. None for the one that is stored, 0.05 where none is.
        output: folder for the page; None for RUN/report. An earlier page there is replaced. With
            another folder the run may be one that cannot be written: its calibration is not kept.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "float32" or "bfloat16".
        memory_format: "auto", "contiguous" or "channels_last".
        note: told what is going on.

    Raises:
        DenselyError: the run or the data are missing, damaged, empty, of one class, or do not fit
            each other; or the network gives NaN.
    """
    if calibration is not None and calibration not in METHODS:
        raise ConfigError(f"calibration='{calibration}': must be one of {', '.join(METHODS)}")
    if wanted_error is not None and not 0 < wanted_error < 1:
        raise ConfigError(f"wanted_error={wanted_error}: must be above 0 and below 1")
    folder = Path(output) if output is not None else Path(run) / "report"
    check_replaceable(folder)
    note("judging ...")
    judged = judge(
        run,
        data,
        split=split,
        data_dir=data_dir,
        device=device,
        precision=precision,
        memory_format=memory_format,
    )
    logits, labels = judged.logits, judged.labels
    check(logits, labels, judged.classifier.classes)

    note("calibrating ...")
    fitted = _calibrate(judged, calibration, wanted_error, split=split, data_dir=data_dir)
    chosen = fitted.chosen
    calibrated = chosen.apply(logits)

    note("drawing heat maps ...")
    mistakes, unsure, label_errors, wrong = _examples(judged, chosen.probabilities(logits))

    note("measuring speed and memory ...")
    (cost,) = costs([(judged.classifier.model, judged.classifier.info)], judged.classifier.runtime)

    # Before the page, which says whether it is kept.
    unkept = _keep(judged, chosen, is_needed=output is None) if fitted.is_new else ()
    scores = scores_of(calibrated, labels, judged.classifier.classes)
    findings = Findings(
        run=str(run),
        data=judged.data,
        date=datetime.date.today().isoformat(),
        warnings=(*_missing_classes(scores), *fitted.warnings, *wrong, *unkept),
        scores=scores,
        method=chosen.method,
        calibrated_on=fitted.where,
        is_stored=fitted.where is not None and not unkept,
        wanted_error=chosen.wanted_error,
        calibration=tuple(
            calibration_score(each.method, each.apply(logits), labels) for each in fitted.tried
        ),
        selective=risk_coverage(calibrated, labels, fitted.choices),
        mistakes=mistakes,
        unsure=unsure,
        label_errors=label_errors,
        cost=cost,
    )
    try:
        page = write_report(folder, findings, curves=_curves(judged.run), tile=tile)
    except RunError as error:
        if not fitted.is_new or unkept:
            raise
        raise RunError(f"{error}; its calibration is stored with the model all the same") from error
    return Report(evaluation_of(judged), findings, page)


def _curves(run: RunDirectory) -> bytes | None:
    """The run's picture; None where there is none, or one that cannot be read."""
    from PIL import Image

    try:
        with Image.open(run.curves_file) as picture:
            picture.verify()
        return run.curves_file.read_bytes()
    except (OSError, SyntaxError):  # the latter of a PNG that is cut off
        return None


def _keep(judged: Judged, calibration: Calibration, *, is_needed: bool) -> tuple[str, ...]:
    """Store a calibration with the model; a warning where the run cannot be written.

    Raises:
        RunError: other weights are there now; or it cannot be written, and `is_needed`.
    """
    weights = find_checkpoint(judged.run.weights()) or judged.run.weights()
    try:
        save_calibration(weights, calibration, judged.classifier.weights_digest)
    except OSError as error:
        reason = error.strerror or error
        if is_needed:
            raise RunError(f"{weights}/calibration.json: cannot be written: {reason}") from error
        return (
            f"The calibration was not kept, as {judged.run.path} cannot be written ({reason}): "
            "densely predict does not apply it.",
        )
    return ()


def _missing_classes(scores: Scores) -> tuple[str, ...]:
    """The warning that there are no images of some classes, where it is so."""
    names = [f"'{score.name}'" for score in scores.classes if not score.support]
    if not names:
        return ()
    listed = ", ".join(names[:CLASSES_NAMED])
    if len(names) > CLASSES_NAMED:
        listed += f" and {len(names) - CLASSES_NAMED} more"
    return (
        f"None of these images is of {listed}: how the network does there is not known, and means "
        "over classes are those of the others.",
    )


@dataclass(frozen=True)
class _Fitted:
    """Calibrations that were tried, the one to use, and thresholds by wanted error."""

    chosen: Calibration
    tried: tuple[Calibration, ...]
    choices: tuple[tuple[float, float | None], ...]
    where: str | None
    warnings: tuple[str, ...]
    is_new: bool


def _calibrate(
    judged: Judged,
    method: Method | None,
    wanted_error: float | None,
    *,
    split: Split,
    data_dir: str | None,
) -> _Fitted:
    classes, warnings = judged.classifier.classes, []
    stored = judged.classifier.calibration
    bare = Calibration.none(len(classes))
    if judged.own and split == "train":
        warnings.append("These are the images that the network learned from: it knows them.")
    try:
        own = judged.own or own_splits(judged.run, judged.classifier, data_dir)
    except DenselyError as error:
        # Other images are judged, and the run's own are gone: what was fitted before still holds.
        warnings.append(
            f"Nothing was fitted, since the run's own data cannot be read ({error}); "
            + ("the calibration stored with it is shown" if stored else "it is not calibrated")
            + (", whatever method or error is asked for." if method or wanted_error else ".")
        )
        chosen = stored or bare
        return _Fitted(
            chosen,
            tried=(bare,) if chosen.method == "none" else (bare, chosen),
            choices=()
            if chosen.wanted_error is None
            else ((chosen.wanted_error, chosen.threshold),),
            where=stored.fitted_on if stored else None,
            warnings=tuple(warnings),
            is_new=False,
        )

    if judged.own is None:
        warnings += _met_before(judged.images, own)
    method = method or (stored.method if stored else "temperature")
    wanted_error = wanted_error or (stored and stored.wanted_error) or 0.05
    where, images, has_learned = fitting_images(own, judged.run.config().split_seed)
    images, logits = seen(judged.classifier, images)
    labels = images.labels.cpu()
    where = f"{where}, {len(labels):,} images"
    if has_learned:
        warnings.append(
            f"The run has no validation split: calibration and thresholds are fitted on "
            f"{len(labels):,} of the images that it learned from, on which it is surer than on new "
            "ones. Train with --validation 0.1 for better ones."
        )
    elif judged.own and split == "validation":
        warnings.append(
            "Calibration and thresholds are fitted on the very images that are judged here: they "
            "look better than they are."
        )
    if method != "none" and len(labels) < FEW_IMAGES:
        warnings.append(
            f"Calibration is fitted on {len(labels)} images only: that may make probabilities "
            "worse, and densely predict applies it all the same. Set more images aside for "
            "validation, or take --calibration none."
        )
    tried = tuple(fit(logits, labels, each, fitted_on=where) for each in METHODS)
    chosen = tried[METHODS.index(method)]
    calibrated = cross_fitted(chosen, logits, labels)
    wanted = sorted({*WANTED_ERRORS, wanted_error})
    choices = tuple((error, threshold_for(calibrated, labels, error)) for error in wanted)
    chosen = replace(chosen, wanted_error=wanted_error, threshold=dict(choices)[wanted_error])
    return _Fitted(chosen, tried, choices, where, tuple(warnings), True)


def _met_before(images: ImageSet, own: Splits) -> list[str]:
    """Warnings where other images than the run's turn out to be its own in part."""
    met = (
        (own.train, "the network learned from"),
        (own.validation, "its best epoch and its calibration go by"),
    )
    counts = [(images.count_among({*part.digests()}), why) for part, why in met if part is not None]
    return [
        f"Of these images {count:,} {'is one' if count == 1 else 'are ones'} that {why}: what is "
        "measured there says nothing of new images."
        for count, why in counts
        if count
    ]


def _examples(
    judged: Judged, probabilities: Tensor
) -> tuple[tuple[Example, ...], tuple[Example, ...], tuple[Example, ...], tuple[str, ...]]:
    """The most confident mistakes, the least confident hits, the likely label errors; warnings."""
    confidence, given = probabilities.max(dim=1)
    right = given == judged.labels

    def ranked(where: Tensor, *, descending: bool) -> list[int]:
        indices = where.nonzero().flatten()
        order = confidence[indices].argsort(descending=descending, stable=True)
        return [int(i) for i in indices[order[:EXAMPLES]]]

    groups = (
        ranked(~right, descending=True),
        ranked(right, descending=False),
        likely_label_errors(probabilities, judged.labels)[:EXAMPLES],
    )
    shown = sorted({index for group in groups for index in group})
    maps, warnings = _heat_maps(judged, shown, given)
    names = judged.classifier.classes

    def example(index: int) -> Example:
        label, answer = int(judged.labels[index]), int(given[index])
        return Example(
            index=index,
            file=judged.images.names[index] if judged.images.names else None,
            label=names[label],
            given=names[answer],
            confidence=float(confidence[index]),
            label_probability=float(probabilities[index, label]),
            pixels=judged.images.images[index].cpu().numpy(),
            heat_map=maps.get(index),
        )

    mistakes, unsure, label_errors = (tuple(map(example, group)) for group in groups)
    return mistakes, unsure, label_errors, warnings


def _heat_maps(
    judged: Judged, indices: Sequence[int], given: Tensor
) -> tuple[dict[int, NDArray[np.float32]], tuple[str, ...]]:
    """Class activation maps for the class given, by index; and warnings where there are none."""
    classifier = judged.classifier
    if not indices:
        return {}, ()
    pixels = judged.images.images[torch.tensor(indices, device=judged.images.images.device)]
    inputs = classifier.runtime.layout(classifier.preprocessing(pixels))
    try:
        found = explain(classifier.model, inputs, given[list(indices)])
    except ConfigError as error:
        return {}, (f"There are no heat maps: {error}.",)
    return dict(zip(indices, found.maps.cpu().numpy(), strict=True)), ()
