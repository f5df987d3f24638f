"""`densely evaluate` and `densely predict`."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ActionYesNo

from densely.cli.parser import Parser, add_fields, flag_of, hardware_of
from densely.errors import ConfigError, DataError
from densely.training.config import HARDWARE, Split, TrainConfig
from densely.words import counted, on_one_line

if TYPE_CHECKING:
    from densely.evaluation.evaluate import Evaluation
    from densely.evaluation.findings import Choice, Findings


def evaluate(parser: Parser, arguments: list[str]) -> None:
    """Judge and calibrate a run, and write a page with pictures: RUN/report/report.html.

    The page has accuracy with intervals, confusions, calibration, the mistakes with heat maps,
    likely label errors, speed and memory; metrics.json beside it has the figures. Calibration and
    the threshold of --wanted-error are fitted on the validation split and stored with the model:
    `densely predict` applies them. An earlier page is replaced.
    """
    parser.add_argument("run", type=str, metavar="RUN", help="run directory")
    parser.add_argument(
        "--data",
        type=str | None,
        metavar="TEXT",
        help="another data set or folder of images; null for what the run learned from",
    )
    parser.add_argument(
        "--data-dir", type=str | None, metavar="TEXT", help="where a named data set is looked for"
    )
    parser.add_argument(
        "--split",
        type=Split,
        metavar="{train,validation,test}",
        default="test",
        help="part of the data; another folder without train/ is judged on as a whole",
    )
    parser.add_argument(
        "--report", action=ActionYesNo(no_prefix="no-"), default=True, help="calibrate and write"
    )
    parser.add_argument(
        "--calibration",
        type=Literal["none", "temperature", "vector"] | None,
        metavar="{temperature,vector,none}",
        help="what is stored with the model; the page compares all. null for what is stored "
        "already, temperature at first",
    )
    parser.add_argument(
        "--wanted-error",
        type=float | None,
        metavar="X",
        help="share of wrong answers that is acceptable where predict is sure; null for what is "
        "stored already, 0.05 at first",
    )
    parser.add_argument(
        "--output", type=str | None, metavar="FOLDER", help="of the page; null for RUN/report"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_fields(parser, TrainConfig(), [HARDWARE])
    chosen = parser.parse_args(arguments)
    hardware = hardware_of(chosen)
    where = {"split": chosen.split, "data_dir": chosen.data_dir}
    if not chosen.report:
        of_report = ("calibration", "wanted_error", "output")
        if flags := [flag_of(name) for name in of_report if chosen[name] is not None]:
            raise ConfigError(f"{', '.join(flags)}: of the report, which --no-report leaves out")

        from densely.evaluation.evaluate import evaluate

        result = evaluate(chosen.run, chosen.data, **where, **hardware)
        if chosen.json:
            print(json.dumps(result.to_dict()))
        else:
            _print_evaluation(result)
        return

    from densely.evaluation.report import report

    def note(text: str) -> None:
        if not chosen.json and sys.stdout.isatty():
            print(text, flush=True)

    done = report(
        chosen.run,
        chosen.data,
        calibration=chosen.calibration,
        wanted_error=chosen.wanted_error,
        output=chosen.output,
        note=note,
        **where,
        **hardware,
    )
    if chosen.json:
        print(json.dumps(done.evaluation.to_dict() | _to_dict(done.findings, done.page)))
        return
    _print_evaluation(done.evaluation)
    _print_calibration(done.findings)
    print(f"report:  {done.page}")


def _to_dict(found: "Findings", page: Path) -> dict[str, Any]:
    """What `_print_calibration` prints, for JSON; all else is in metrics.json beside the page."""
    before, after, choice = found.before, found.after, found.choice
    return {
        "report": str(page),
        "warnings": found.warnings,
        "calibration": {
            "method": found.method,
            "fitted_on": found.calibrated_on,
            "ece": before.ece,
            "ece_calibrated": after.ece,
            "accuracy_calibrated": found.scores.accuracy.value,
            "loss_calibrated": after.nll,
        },
        "threshold": choice and dataclasses.asdict(choice),
    }


def _print_calibration(found: "Findings") -> None:
    print()
    for warning in found.warnings:
        print(f"note: {warning}")
    before, after = found.before, found.after
    if after is not before:
        print(
            f"calibration error {before.ece:.4f}, and {after.ece:.4f} with {after.method} scaling "
            f"(fitted on {found.calibrated_on})"
        )
        print(f"calibrated: accuracy {found.scores.accuracy.value:.4f}, loss {after.nll:.4f}")
    else:
        print(f"calibration error {before.ece:.4f}, not calibrated")
    if found.choice:
        print(_in_words(found.choice))


def _in_words(choice: "Choice") -> str:
    wanted = f"for an error of at most {choice.wanted_error:.3g}"
    if choice.threshold is None:
        return f"{wanted} there is no threshold: the images for calibration do not show that much"
    error = "none wrong" if not choice.error else f"{choice.error:.2%} of them wrong"
    from densely.evaluation.report_page import number

    return (
        f"{wanted} it is sure from {number(choice.threshold)} on: {choice.coverage:.1%} of these "
        f"images, {error}"
    )


def _print_evaluation(result: "Evaluation") -> None:
    from rich.cells import cell_len, set_cell_size

    print(
        f"accuracy {result.accuracy:.4f}, loss {result.loss:.4f} "
        f"on {counted(result.images, 'image')} ({result.data})"
    )
    table, names = result.confusion, [on_one_line(name) for name in result.classes]
    if len(names) <= 20:
        width = max(len(str(table.max())), len(str(len(names)))) + 2
        margin = max(map(cell_len, names)) + 4
        print("\nconfusions: rows are the true class, columns the class given")
        print(" " * margin + "".join(f"{i:{width}}" for i in range(len(names))))
        for i, row in enumerate(table):
            begin = f"{i:2} {set_cell_size(names[i], margin - 3)}"
            print(begin + "".join(f"{n:{width}}" for n in row))
        return
    wrong = [(n, i, j) for i, row in enumerate(table) for j, n in enumerate(row) if i != j and n]
    print("\nthe ten most frequent confusions:")
    for n, i, j in sorted(wrong, key=lambda cell: -cell[0])[:10]:  # equals in the page's order
        print(f"{n:6}  {names[i]} taken for {names[j]}")


def predict(parser: Parser, arguments: list[str]) -> None:
    """Name what is in image files: class and probability (PNG, JPEG, BMP, WebP; any size)."""
    parser.add_argument("run", type=str, metavar="RUN", help="run directory")
    parser.add_argument(
        "images",
        type=str,
        nargs="+",
        metavar="IMAGE",
        help="image files, or folders of them",
    )
    parser.add_argument(
        "--top", type=int, metavar="N", default=1, help="classes to name for each image"
    )
    parser.add_argument(
        "--calibrated",
        action=ActionYesNo(no_prefix="no-"),
        default=True,
        help="apply the calibration and the threshold that densely evaluate has fitted",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line, all classes")
    add_fields(parser, TrainConfig(), [HARDWARE])
    chosen = parser.parse_args(arguments)
    if chosen.top < 1:
        raise ConfigError(f"--top {chosen.top}: must be at least 1")

    from rich.cells import cell_len, set_cell_size

    from densely.data.layout import images_below, left_out_notes
    from densely.evaluation.classifier import load
    from densely.runtime import settle_process

    folders = {name: images_below(Path(name)) for name in chosen.images if os.path.isdir(name)}
    paths = [
        str(path)
        for name in chosen.images
        for path in (folders[name].images if name in folders else [name])
    ]
    for name, part in folders.items():
        for note in left_out_notes([part]):
            print(f"{parser.prog}: {name}: {note}", file=sys.stderr)
    settle_process()
    classifier = load(
        chosen.run,
        **hardware_of(chosen),
        calibrated=chosen.calibrated,
    )
    shown = [on_one_line(path) for path in paths]
    margin = max(map(cell_len, shown))
    found = classifier.predict_each(paths)
    unread = 0
    for path, name, prediction in zip(paths, shown, found, strict=True):
        if isinstance(prediction, DataError):
            if len(paths) == 1:
                raise prediction
            print(f"{parser.prog}: {prediction}", file=sys.stderr)
            unread += 1
        elif chosen.json:
            print(json.dumps({"image": path} | dataclasses.asdict(prediction)))
        else:
            ranked = list(prediction.probabilities.items())[: chosen.top]
            for i, (label, probability) in enumerate(ranked):
                unsure = "  (unsure)" if i == 0 and prediction.sure is False else ""
                line = f"{probability:6.4f}  {on_one_line(label)}{unsure}"
                print(f"{set_cell_size('' if i else name, margin)}  {line}")
    if unread:
        raise DataError(f"{unread} of {len(paths)} images could not be read")
