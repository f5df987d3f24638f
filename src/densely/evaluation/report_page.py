"""The page that one looks at after an evaluation: a single file that needs nothing else."""

import base64
import io
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densely.errors import ConfigError, RunError
from densely.evaluation.findings import Example, Findings
from densely.evaluation.pictures import (
    class_picture,
    confusion_picture,
    reliability_picture,
    risk_coverage_picture,
)
from densely.whole_file import whole_file
from densely.words import counted

#: Draws uint8 pixels [C, H, W] and a heat map [h, w], where there is one, side by side.
Tile = Callable[[NDArray[np.uint8], NDArray[np.float32] | None], Image.Image]
FILES = ("metrics.json", "report.html")
CONFUSIONS_LISTED = 10
#: Columns of tiles are at least as wide as the widest tile, within these bounds, in CSS pixels.
COLUMN_WIDTHS = (150, 310)

#: Titles in the table of contents, by anchor.
SECTIONS = {
    "confusions": "Confusions",
    "classes": "Classes",
    "calibration": "Calibration",
    "answers": "When to answer",
    "mistakes": "Mistakes",
    "unsure": "Unsure",
    "labels": "Labels in doubt",
    "training": "Training",
    "network": "Network",
    "glossary": "How to read it",
}
GLOSSARY = (
    ("Accuracy", "Share of the images whose likeliest class is right."),
    (
        "95% interval",
        "Where the figure would plausibly lie, had it been taken on endlessly many such images.",
    ),
    ("Precision", "Of the images called a class, the share that is of it."),
    ("Recall", "Of the images of a class, the share that is called so."),
    ("F1", "Harmonic mean of precision and recall: high only where both are."),
    (
        "Macro F1",
        "Mean of F1 over the classes that have images: rare ones count as much as frequent ones.",
    ),
    ("Balanced accuracy", "Mean recall of the classes, however many images each has."),
    (
        "AUROC",
        "Chance that an image of the class gets a higher score for it than another: 0.5 is "
        "guessing, 1 is perfect.",
    ),
    (
        "Average precision",
        "Precision averaged over all recalls; stricter than AUROC where a class is rare.",
    ),
    (
        "Confidence",
        "The probability that the network gives its answer, after calibration where there is one.",
    ),
    ("NLL", "Mean negative logarithm of the true class's probability: 0 is perfect."),
    (
        "Brier score",
        "Mean squared distance of the probabilities from the truth: 0 to 2, 0 is perfect.",
    ),
    (
        "ECE",
        "Expected calibration error: how far confidence and share of right answers lie apart, on "
        "average over 15 bins of equal width; adaptive: of equal numbers of images.",
    ),
    ("Temperature", "Calibration that divides all scores by one number; no answer changes."),
    (
        "Vector",
        "Calibration that scales and shifts each class's score by itself; answers may change.",
    ),
    ("Coverage", "Share of the images that get an answer."),
    ("Risk", "Share of wrong answers among those given."),
    ("AURC", "Risk averaged over all coverages: smaller is better."),
    (
        "Heat map",
        "Class activation map: which parts of the image raised or lowered the score of the class "
        "given.",
    ),
    ("MACs", "Multiplications with addition that one image takes."),
    (
        "Kept in training",
        "Memory that a training step holds for its backward pass, for each image of a batch.",
    ),
)


@dataclass(frozen=True)
class Picture:
    """An image as it stands in the page: data URI, size in pixels, and words for the blind."""

    uri: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Confusion:
    """Images of class `label` that were called `given`; `share` is of all images of `label`."""

    label: str
    given: str
    images: int
    share: float


@dataclass(frozen=True)
class Legend:
    """Colours of the heat maps, and what the leftmost and the rightmost mean."""

    colors: Picture
    least: str
    most: str


@dataclass(frozen=True)
class Card:
    """An example with its tile; `is_enlarged` where one of its pixels covers several.

    `name` is that of its file, from the data folder on, or its number where it has none.
    """

    example: Example
    name: str
    tile: Picture
    is_enlarged: bool


def render(findings: Findings, *, curves: bytes | None, tile: Tile) -> str:
    """The page as HTML; the same findings give the same text.

    Args:
        findings: what to show.
        curves: PNG of the run's curves; None where there is none.
        tile: draws an example, the image alone where the heat map is None.
    """
    missing = {
        "confusions": findings.scores.confusion is None,
        "training": curves is None,
    }
    sheets = {
        name: [_card(example, tile) for example in getattr(findings, name)]
        for name in ("mistakes", "unsure", "label_errors")
    }
    return _environment().get_template("report.html.jinja").render(
        findings=findings,
        scores=findings.scores,
        before=findings.before,
        after=findings.after,
        summary=summary(findings),
        sections={key: title for key, title in SECTIONS.items() if not missing.get(key)},
        pictures=_pictures(findings, curves),
        confusions=_confusions(findings),
        sheets=sheets,
        column_width=_column_width(sheets),
        legend=_legend(findings, tile),
        glossary=GLOSSARY,
        fastest=max([*findings.cost.images_per_s.values(), findings.cost.train_images_per_s]),
    )  # fmt: skip


def write_report(folder: Path, findings: Findings, *, curves: bytes | None, tile: Tile) -> Path:
    """Write `metrics.json` and `report.html`, as a whole: an older report stands until then.

    Args:
        folder: made where it is missing; the files of an older report in it are replaced.
        findings: what to write.
        curves: PNG of the run's curves; None where there is none.
        tile: draws an example, the image alone where the heat map is None.

    Returns:
        The path of `report.html`.

    Raises:
        ConfigError: `folder` holds something else than a report.
        RunError: it cannot be written.
    """
    check_replaceable(folder)
    metrics = json.dumps(findings.to_dict(), indent=2, allow_nan=False) + "\n"
    page = render(findings, curves=curves, tile=tile)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as both:  # neither takes its place before both are written
            for name, text in zip(FILES, (metrics, page), strict=True):
                beside = both.enter_context(whole_file(folder / name))
                # A folder's name that is no text may be a class's name.
                beside.write_text(text, encoding="utf-8", errors="replace", newline="")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder / "report.html"


def check_replaceable(folder: Path) -> None:
    """Put a report among nothing else: nobody would look for it there, or know whose files are.

    Raises:
        ConfigError: `folder` is there, and is no report and no empty folder.
    """
    try:
        # Names with a dot in front are the file browser's.
        names = (path.name for path in folder.iterdir())
        others = sorted(name for name in names if name not in FILES and name[0] != ".")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{folder}: no folder for a report: {error.strerror}") from error
    if others:
        raise ConfigError(
            f"{folder}: holds {others[0]}, which is no part of a report; name a new or an empty one"
        )
    for name in FILES:
        if (folder / name).is_dir():
            raise ConfigError(f"{folder}: {name} in it is a folder; name a new or an empty one")


def percent(share: float) -> str:
    """A share in percent with one decimal, and with more where it would look like none or all."""
    return _rounded(100 * share, 1, (0, 100)) + "%"


def number(value: float) -> str:
    """Three decimals, and more where it would look like 0 or 1."""
    return _rounded(value, 3, (0, 1))


def thousands(count: int) -> str:
    """A whole number with commas."""
    return f"{count:,}"


def three_digits(value: float) -> str:
    """Three digits that count; of large numbers, all before the point."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _rounded(value: float, decimals: int, ends: tuple[float, float]) -> str:
    for more in range(decimals, 16):  # so many has float64
        text = f"{value:.{more}f}"
        if float(text) not in ends:
            return text
    return f"{value:.{decimals}f}"


def _of_images(share: float, images: int) -> str:
    """A share in words: "91 of 120 images", "all 120 images"."""
    some = round(share * images)
    if some in (0, images):
        return f"{'all' if some else 'none of the'} {counted(images, 'image')}"
    return f"{some:,} of {counted(images, 'image')}"


def summary(findings: Findings) -> list[str]:
    """What the figures come to, in sentences that need no statistics."""
    scores = findings.scores
    right = _of_images(scores.accuracy.value, scores.images)
    if scores.confusion is None:
        sentences = [f"It gets all labels right on {right}."]
    else:
        sentences = [f"It is right on {right}."]
    # Around 90% says most, if enough images are there; else where most of them are.
    bins = [b for b in findings.after.bins if b.images]
    ninety = [b for b in bins if b.low < 0.9 <= b.high and b.images >= 20]
    if bins:
        told = max(ninety or bins, key=lambda b: b.images)
        sentences.append(
            f"Where it is about {percent(told.confidence)} sure, it is right "
            f"{percent(told.accuracy)} of the time ({counted(told.images, 'image')})."
        )
    choice = findings.choice
    if choice and choice.threshold is not None and choice.error is not None:
        sentences.append(
            f"If it answers only where it is at least {percent(choice.threshold)} sure, "
            f"{_of_images(choice.coverage, scores.images)} get an answer, "
            f"{percent(choice.error)} of them a wrong one."
        )
    if confusions := _confusions(findings):
        most = confusions[0]
        sentences.append(
            f"Its most frequent mistake: “{most.label}” called “{most.given}” "
            f"({counted(most.images, 'time')})."
        )
    found = [(score.recall, score.name) for score in scores.classes if score.recall is not None]
    if len(found) > 1 and scores.accuracy.value < 1:
        recall, name = min(found, key=lambda row: row[0])
        sentences.append(
            f"The class that it finds least often: “{name}”, {percent(recall)} of them."
        )
    return sentences


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("densely.evaluation", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "thousands": thousands,
        "three_digits": three_digits,
    }
    return environment


def _pictures(findings: Findings, curves: bytes | None) -> dict[str, Picture]:
    """Those that there are, by name."""
    scores, selective = findings.scores, findings.selective
    before, after = findings.before, findings.after
    is_calibrated = after is not before
    found = {
        "classes": _picture(
            class_picture(scores), "Precision and recall of the classes, lowest F1 first; the "
            "figures are in the table below.",
        ),
        "reliability": _picture(
            reliability_picture(before, after if is_calibrated else None),
            f"Reliability diagram: expected calibration error {percent(before.ece)}"
            + (f" before, {percent(after.ece)} after calibration." if is_calibrated else "."),
        ),
        "risk": _picture(
            risk_coverage_picture(selective),
            f"Risk-coverage curve with a mean risk of {selective.area:.4f}.",
        ),
    }  # fmt: skip
    if scores.confusion is not None:
        found["confusion"] = _picture(
            confusion_picture(scores),
            f"Confusion matrix of {len(scores.classes)} classes; the largest confusions are in "
            "the table below.",
        )
    if curves is not None:
        found["curves"] = _picture(curves, "Loss and accuracies of the run over its epochs.")
    return found


def _confusions(findings: Findings) -> list[Confusion]:
    """The largest cells beside the diagonal, largest first."""
    if findings.scores.confusion is None:
        return []
    wrong = findings.scores.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS_LISTED]
    names = [score.name for score in findings.scores.classes]
    totals = findings.scores.confusion.sum(axis=1)
    return [
        Confusion(names[row], names[column], images, images / int(totals[row]))
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if (images := int(wrong[row, column]))
    ]


def _card(example: Example, tile: Tile) -> Card:
    image = tile(example.pixels, example.heat_map)
    is_enlarged = image.height > example.pixels.shape[1]
    with_map = "" if example.heat_map is None else ", beside it the same under its heat map"
    name = example.file or f"image {example.index}"
    alt = f"{name}, labelled {example.label}, called {example.given}{with_map}."
    return Card(example, name, _picture(_encoded(image), alt), is_enlarged)


def _column_width(sheets: dict[str, list[Card]]) -> int:
    narrowest, widest = COLUMN_WIDTHS
    widths = [card.tile.width for cards in sheets.values() for card in cards]
    return min(max([narrowest, *widths]), widest)


def _legend(findings: Findings, tile: Tile) -> Legend | None:
    """What `tile` makes of an evenly rising heat map, whatever its colours; None without maps."""
    examples = (*findings.mistakes, *findings.unsure, *findings.label_errors)
    maps = [example.heat_map for example in examples if example.heat_map is not None]
    if not maps:
        return None
    is_signed = any((heat_map < 0).any() for heat_map in maps)
    grey = np.full((len(examples[0].pixels), 16, 128), 128, dtype=np.uint8)
    ramp = np.linspace(-1 if is_signed else 0, 1, 128, dtype=np.float32)
    pair = tile(grey, np.tile(ramp, (16, 1)))
    # The right one of the two; between them there may be a gap.
    overlay = pair.crop((pair.width - pair.height * 128 // 16, 0, pair.width, pair.height))
    least, most = ("against it", "for it") if is_signed else ("nothing", "much")
    alt = f"Colours of the heat maps, from {least} to {most}."
    return Legend(_picture(_encoded(overlay), alt), least, most)


def _encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def _picture(png: bytes, alt: str) -> Picture:
    with Image.open(io.BytesIO(png)) as image:
        width, height = image.size
    return Picture("data:image/png;base64," + base64.b64encode(png).decode(), width, height, alt)
