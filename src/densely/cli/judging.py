"""`densely evaluate` and `densely predict`."""

import dataclasses
import json
from typing import TYPE_CHECKING, Literal

from densely.cli.parser import Parser, add_fields
from densely.errors import ConfigError
from densely.training.config import HARDWARE, TrainConfig

if TYPE_CHECKING:
    from densely.evaluation.evaluate import Evaluation


def evaluate(parser: Parser, arguments: list[str]) -> None:
    """Judge a run: accuracy, loss and a table of confusions, on its test split or other data."""
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
        type=Literal["train", "validation", "test"],
        metavar="{train,validation,test}",
        default="test",
        help="part of the data; another folder without train/ is judged on as a whole",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_fields(parser, TrainConfig(), [HARDWARE])
    chosen = parser.parse_args(arguments)

    from densely.evaluation.evaluate import evaluate

    result = evaluate(
        chosen.run,
        chosen.data,
        split=chosen.split,
        data_dir=chosen.data_dir,
        device=chosen.device,
        precision=chosen.precision,
        memory_format=chosen.memory_format,
    )
    if chosen.json:
        print(json.dumps(result.to_dict()))
    else:
        _print_evaluation(result)


def _print_evaluation(result: "Evaluation") -> None:
    print(
        f"accuracy {result.accuracy:.4f}, loss {result.loss:.4f} "
        f"on {result.images:,} images ({result.data})"
    )
    table, names = result.confusion, result.classes
    if len(names) <= 20:
        width = max(len(str(table.max())), len(str(len(names)))) + 2
        margin = max(map(len, names)) + 4
        print("\nconfusions: rows are the true class, columns the class given")
        print(" " * margin + "".join(f"{i:{width}}" for i in range(len(names))))
        for i, row in enumerate(table):
            print(f"{i:2} {names[i]:{margin - 3}}" + "".join(f"{n:{width}}" for n in row))
        return
    wrong = [(n, i, j) for i, row in enumerate(table) for j, n in enumerate(row) if i != j and n]
    print("\nthe ten most frequent confusions:")
    for n, i, j in sorted(wrong, reverse=True)[:10]:
        print(f"{n:6}  {names[i]} taken for {names[j]}")


def predict(parser: Parser, arguments: list[str]) -> None:
    """Name what is in image files: class and probability (PNG, JPEG, BMP, WebP; any size)."""
    parser.add_argument("run", type=str, metavar="RUN", help="run directory")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--top", type=int, metavar="N", default=1, help="classes to name for each image"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line, all classes")
    add_fields(parser, TrainConfig(), [HARDWARE])
    chosen = parser.parse_args(arguments)
    if chosen.top < 1:
        raise ConfigError(f"--top {chosen.top}: must be at least 1")

    from densely.evaluation.classifier import load

    classifier = load(
        chosen.run,
        device=chosen.device,
        precision=chosen.precision,
        memory_format=chosen.memory_format,
    )
    margin = max(map(len, chosen.images))
    for path, prediction in zip(chosen.images, classifier.predict(chosen.images), strict=True):
        if chosen.json:
            print(json.dumps({"image": path} | dataclasses.asdict(prediction)))
            continue
        ranked = list(prediction.probabilities.items())[: chosen.top]
        for i, (label, probability) in enumerate(ranked):
            print(f"{'' if i else path:{margin}}  {probability:6.4f}  {label}")
