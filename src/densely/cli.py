"""The commands. Nothing heavy is imported before a command needs it, so that help answers at once.

Exit codes: 0 fine, 1 failure, 2 usage or configuration; after saving, 130 for Ctrl-C, 143 for
SIGTERM, 129 for a closed terminal.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

import densely
from densely.errors import ConfigError, DenselyError, unknown_name
from densely.training.config import FREE_ON_RESUME, HARDWARE, RECIPES, TrainConfig, read_yaml

if TYPE_CHECKING:
    from densely.bench.config import BenchConfig
    from densely.evaluation.evaluate import Evaluation
    from densely.training.reporting import Reporter


class _Parser(ArgumentParser):
    """Faults as one line, through the same door as all other errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        if found := re.fullmatch(r'Parser key "(\w+)": (.*)', message):
            key, reason = found.groups()
            message = f"{_flag(key)}: {_in_plain_words(reason)}"
        elif found := re.match(r"unrecognized arguments: (--[\w-]+)", message, re.IGNORECASE):
            flags = [flag for action in self._actions for flag in action.option_strings]
            message = unknown_name("flag", found[1], flags)
        raise ConfigError(f"{message} (see {self.prog} --help)") from ex


def _in_plain_words(reason: str) -> str:
    """What jsonargparse says of a value of the wrong type, without Python's names for types."""
    value = re.sub(r".*[Vv]alue: ?", "", reason)
    if choices := re.search(r"Literal\[(.*?)\]", reason):
        return f"expected one of {choices[1]}, got '{value}'"
    kinds = dict.fromkeys(re.findall(r"<class '(\w+)'>", reason.partition("Errors:")[0]))
    if not kinds:
        return reason
    return f"expected {' or '.join(kinds).replace('NoneType', 'null')}, got '{value}'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be no text at all
        sys.stdout.reconfigure(errors="backslashreplace")
    prog = f"densely {command}" if command in _COMMANDS else "densely"
    try:
        if command in ("-h", "--help"):
            print(_overview())
        elif command == "--version":
            print(f"densely {densely.__version__}")
        elif command in _COMMANDS:
            _COMMANDS[command](_parser(command), arguments[1:])
        else:
            raise ConfigError(f"{unknown_name('command', command, _COMMANDS)} (see densely --help)")
    except DenselyError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that may not be read, a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"{prog}: {where}{error.strerror or error}", file=sys.stderr)
        return 2 if error.filename else 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser(command: str) -> _Parser:
    description = (_COMMANDS[command].__doc__ or "").strip()
    return _Parser(
        prog=f"densely {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _overview() -> str:
    lines = [(command.__doc__ or "").strip().splitlines()[0] for command in _COMMANDS.values()]
    width = max(map(len, _COMMANDS))
    return "\n".join(
        [
            "usage: densely COMMAND [OPTIONS]",
            "",
            "DenseNets for PyTorch: learn, train, explain and serve them.",
            "",
            "commands:",
            *(f"  {name:{width}}  {line}" for name, line in zip(_COMMANDS, lines, strict=True)),
            "",
            "begin with:  densely train",
            "then:        densely predict runs/quickstart-001 IMAGE...",
            "each command explains its options:  densely COMMAND --help",
        ]
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _train(parser: _Parser, arguments: list[str]) -> None:
    """Train a network and write a run directory: weights, curves, metrics, model card.

    Values come from a recipe, then from a YAML file, then from flags: the later ones win. Without
    any, the quick start learns handwritten digits in less than a minute.
    """
    # What decides the defaults is read first, so that --help shows those that will hold.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--recipe", "--config", "--resume"):
        first.add_argument(flag)
    try:
        early, rest = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if early.resume is not None:
        if early.recipe is not None or early.config is not None:
            raise ConfigError("--resume takes recipe and config from the run; leave them out")
        from densely.training.run import RunDirectory

        base = RunDirectory.open(Path(early.resume)).config()
    else:
        values = read_yaml(Path(early.config)) if early.config is not None else {}
        if early.recipe is not None:
            values["recipe"] = early.recipe
        base = TrainConfig.from_values(values)

    source = parser.add_argument_group("where values come from")
    source.add_argument(
        "--recipe", metavar="NAME", default=base.recipe, help=f"one of {', '.join(RECIPES)}"
    )
    source.add_argument("--config", metavar="FILE", help="YAML file with some of the values below")
    source.add_argument("--resume", metavar="RUN", help="go on with a stopped run")
    _add_fields(parser, base)
    _add_voices(parser)
    chosen = parser.parse_args(rest)

    changed = {
        field.name: getattr(chosen, field.name)
        for field in dataclasses.fields(base)
        if field.name != "recipe" and getattr(chosen, field.name) != getattr(base, field.name)
    }
    if early.resume is not None and (fixed := sorted(set(changed) - {*FREE_ON_RESUME})):
        raise ConfigError(
            f"{', '.join(map(_flag, fixed))}: fixed by the run {early.resume}; with --resume only "
            f"{', '.join(map(_flag, sorted(FREE_ON_RESUME)))} may change"
        )
    config = dataclasses.replace(base, **changed)

    from densely.training.loop import train

    train(
        config,
        resume=Path(early.resume) if early.resume is not None else None,
        reporter=_reporter(chosen.quiet, chosen.json),
    )


def _add_fields(
    parser: _Parser, base: "TrainConfig | BenchConfig", groups: Sequence[str] = ()
) -> None:
    """Give each field of the config its flag, with `base` as defaults; all groups, or some."""
    hints = get_type_hints(type(base))
    titled: dict[str, Any] = {}
    for field in dataclasses.fields(base):
        title = field.metadata["group"]
        if field.name == "recipe" or (groups and title not in groups):
            continue
        if title not in titled:
            titled[title] = parser.add_argument_group(title)
        hint, flag = hints[field.name], _flag(field.name)
        options = {"default": getattr(base, field.name), "help": field.metadata["help"]}
        if hint is bool:
            titled[title].add_argument(flag, action=ActionYesNo(no_prefix="no-"), **options)
        else:
            titled[title].add_argument(flag, type=hint, metavar=_metavar(hint), **options)


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    kinds = set(get_args(hint)) or {hint}
    return "N" if int in kinds else "X" if float in kinds else "TEXT"


def _add_voices(parser: _Parser) -> None:
    group = parser.add_argument_group("what it prints")
    group.add_argument("--quiet", action="store_true", help="only the run directory, at the end")
    group.add_argument("--json", action="store_true", help="a JSON object a line")


def _reporter(quiet: bool, as_json: bool) -> "Reporter":
    from densely.training import reporting

    if quiet and as_json:
        raise ConfigError("--quiet and --json exclude each other")
    if quiet:
        return reporting.Reporter()
    if as_json:
        return reporting.JsonReporter()
    return reporting.BarReporter() if sys.stdout.isatty() else reporting.PlainReporter()


def _evaluate(parser: _Parser, arguments: list[str]) -> None:
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
    _add_fields(parser, TrainConfig(), [HARDWARE])
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


def _predict(parser: _Parser, arguments: list[str]) -> None:
    """Name what is in image files: class and probability (PNG, JPEG, BMP, WebP; any size)."""
    parser.add_argument("run", type=str, metavar="RUN", help="run directory")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--top", type=int, metavar="N", default=1, help="classes to name for each image"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line, all classes")
    _add_fields(parser, TrainConfig(), [HARDWARE])
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


def _convert(parser: _Parser, arguments: list[str]) -> None:
    """Rewrite weights of one package for another: torchvision, timm, MONAI, Keras, ...

    The dialect of SRC is found by its keys, every shape is checked, and DST is written whole or
    not at all. Formats show in the endings: .safetensors, .pth, .pt, .tar; .h5 and .weights.h5
    for Keras (pip install "densely[keras]").
    """
    parser.add_argument("source", type=str, metavar="SRC", help="file of weights")
    parser.add_argument("target", type=str, metavar="DST", help="file to write")
    parser.add_argument(
        "--to",
        type=str,
        metavar="NAME",
        default="densely",
        help="densely, torchvision, torchvision_legacy, timm, monai, keras, efficient, "
        "andreasveit or bamos",
    )
    parser.add_argument(
        "--from", dest="dialect", type=str, metavar="NAME", default="auto", help="dialect of SRC"
    )
    parser.add_argument(
        "--prefix",
        type=str | None,
        metavar="TEXT",
        help="what stands before the network's keys, such as encoder.; others are left out",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run both files on the same input, by the package itself where it is installed, and "
        "print the largest difference of logits",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    chosen = parser.parse_args(arguments)

    from densely.weights.convert import convert_weights

    done = convert_weights(
        chosen.source,
        chosen.target,
        to=chosen.to,
        dialect=chosen.dialect,
        prefix=chosen.prefix,
        check=chosen.check,
    )
    if chosen.json:
        print(json.dumps(dataclasses.asdict(done)))
        return
    print(f"{done.source}: {done.network}, {done.tensors} tensors, {done.dialect} names")
    if done.ignored:
        print(f"left out: {', '.join(done.ignored)}")
    for note in done.notes:
        print(note)
    for by, difference in done.differences.items():
        if difference is None:
            print(f"not checked by {by}")
        else:
            print(
                f"largest difference of logits, {by}: {difference:.3g} (logits up to "
                f"{done.scale:.3g})"
            )
    print(f"written: {done.target}, {done.to} names")


def _models(parser: _Parser, arguments: list[str]) -> None:
    """List the networks: parameters, multiplications of one image, smallest image."""
    parser.add_argument(
        "pattern", type=str, nargs="?", metavar="PATTERN", default="*", help='such as "*bc*"'
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    chosen = parser.parse_args(arguments)

    from densely.models.registry import list_models, model_facts

    pattern = chosen.pattern.lower()
    names = list_models(pattern) or list_models(f"*{pattern}*")
    if not names:
        raise ConfigError(
            f"no network is called like {chosen.pattern}; known: {', '.join(list_models())}"
        )
    rows = [model_facts(name) for name in names]
    if chosen.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
        return
    print(f"{'name':20}{'parameters':>12}{'GMACs':>8}  {'at':12}{'from pixels':>11}  task")
    for row in rows:
        print(
            f"{row.name:20}{row.parameters:12,}{row.macs / 1e9:8.3f}  "
            f"{'x'.join(map(str, row.input_shape)):12}{row.min_image_size:11}  {row.task}"
        )


def _bench(parser: _Parser, arguments: list[str]) -> None:
    """Measure speed and memory beside other DenseNets, in turns; leave tables and pictures.

    Begin with `densely bench --quick`, a look in a minute or two. Without options all is measured,
    in a quarter of an hour on two cores; `--net d2l --mode train` measures a part. Written to
    --output: bench-DEVICE.json with every figure, machine, versions and commit; bench-DEVICE.png,
    bars of speed and memory; bench-DEVICE-depth.png, memory against depth.

    Each network runs as densely and as its peers run it: torchvision, timm and MONAI, or a plain
    PyTorch net, as shipped and tuned. All have one turn before any has the next; ratios are taken
    round by round. A peer that is not installed is a named gap. Run nothing beside it.
    """
    from densely.bench.config import BenchConfig

    # Read first, so that --help shows the defaults that will hold.
    _add_fields(parser, BenchConfig.starting_from(quick="--quick" in arguments))
    chosen = parser.parse_args(arguments)
    names = [field.name for field in dataclasses.fields(BenchConfig)]
    config = BenchConfig(**{name: getattr(chosen, name) for name in names})

    from densely.bench.run import run_bench

    run_bench(config)


def _doctor(parser: _Parser, arguments: list[str]) -> None:
    """Print what a bug report needs: versions, hardware, what was chosen and why, data folders."""
    parser.add_argument("--device", metavar="TEXT", default="auto", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    chosen = parser.parse_args(arguments)

    from densely.doctor import diagnosis

    facts = diagnosis(chosen.device)
    if chosen.json:
        print(json.dumps(facts))
        return
    reasons = facts.pop("reasons")
    assert isinstance(reasons, dict)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {text}" for name, text in value.items())
        lines = value if isinstance(value, list) else [value]
        because = f" ({reasons[key]})" if key in reasons else ""
        print(f"{key.replace('_', ' ') + ':':26}{lines[0]}{because}")
        for line in lines[1:]:
            print(f"{'':26}{line}")


_COMMANDS: dict[str, Callable[[_Parser, list[str]], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "convert": _convert,
    "models": _models,
    "bench": _bench,
    "doctor": _doctor,
}
