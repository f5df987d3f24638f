"""`densely compare`."""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densely.cli.parser import (
    Parser,
    add_fields,
    changed_fields,
    flag_of,
    hardware_of,
    read_first,
)
from densely.cli.training import add_voices, reporter_of
from densely.comparison.config import COMPARISONS, CompareConfig, read_variant
from densely.errors import ConfigError, unknown_name
from densely.training.config import RECIPES, Split, TrainConfig, read_yaml

if TYPE_CHECKING:
    from densely.comparison.compare import Comparison
    from densely.training.reporting import Reporter


#: Flags that say on what, and not what is compared.
_FOR_RUNS = {
    *("--data", "--data-dir", "--split", "--name", "--output", "--quiet", "--json"),
    *("--device", "--precision", "--memory-format"),
}
#: What may differ when a comparison goes on: where and how fast, not what.
#: Of the precision, `change_folder` sees to it that no run was trained in another.
_FREE = ("data", "data_dir", "device", "precision", "memory_format")


def compare(parser: Parser, arguments: list[str]) -> None:
    """Hold networks side by side on the same data: accuracy over seeds, tests, speed, memory.

    `densely compare RUN RUN...` judges trained runs on the same images. Without runs it trains
    variants of one configuration with the same seeds and budget, and then judges them:

    `densely compare --recipe average-or-max` settles a claim of the chapter at full size;
    `densely compare --recipe average-or-max --image-size 48 --limit 12000 --epochs 8` a cut of it;
    `densely compare --data FOLDER --variant "small: {model: densenet_bc_22_12}"
    --variant "large: {model: densenet121}"` anything else.

    It leaves runs/compare-NAME-NNN with comparison.png, README.md (tables), comparison.json and
    all runs. A stopped comparison goes on with --resume.
    """
    early, rest = read_first(arguments, "--recipe", "--config", "--resume")
    if sum(value is not None for value in vars(early).values()) > 1:
        raise ConfigError("--recipe, --config and --resume exclude each other")
    base = _base(early)
    train = base.train if isinstance(base, CompareConfig) else base

    parser.add_argument("runs", type=str, nargs="*", metavar="RUN", help="run directories")
    source = parser.add_argument_group("what to train and compare")
    source.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"a comparison: {', '.join(COMPARISONS)}; or what variants begin with: "
        f"{', '.join(RECIPES)}",
    )
    source.add_argument(
        "--config", metavar="FILE", help="YAML with name, train, variants, seeds, split"
    )
    source.add_argument("--resume", metavar="FOLDER", help="go on with a stopped comparison")
    source.add_argument(
        "--variant",
        action="append",
        metavar="'NAME: {FIELD: VALUE}'",
        help="fields that a variant changes; once for each variant",
    )
    source.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        default=base.seeds if isinstance(base, CompareConfig) else 3,
        help="runs of each variant",
    )
    judged = parser.add_argument_group("which images runs are judged on")
    judged.add_argument(
        "--split",
        type=Split,
        metavar="{train,validation,test}",
        default=base.split if isinstance(base, CompareConfig) else "test",
        help="part of the data",
    )
    add_fields(parser, train)
    add_voices(parser)
    chosen = parser.parse_args(rest)
    reporter_of(chosen.quiet, chosen.json)  # refuses what excludes each other
    if chosen.runs:
        given = {flag.partition("=")[0] for flag in arguments if flag.startswith("--")}
        if unfit := sorted(given - _FOR_RUNS):
            raise ConfigError(f"{', '.join(unfit)}: runs are compared as they are; leave it out")
        _judge([Path(run) for run in chosen.runs], chosen, "--data" in given)
        return

    from densely.comparison.training import change_folder, create_folder

    changed = changed_fields(train, chosen)
    if early.resume is not None:
        assert isinstance(base, CompareConfig)
        same = (chosen.seeds, chosen.split) == (base.seeds, base.split)
        if changed.keys() - _FREE or chosen.variant or not same:
            raise ConfigError(
                "--resume goes on with a comparison as it began; only "
                f"{', '.join(flag_of(name) for name in _FREE)} may change"
            )
        folder = Path(early.resume)
        config = dataclasses.replace(base, train=dataclasses.replace(base.train, **changed))
        if changed:
            change_folder(folder, config)
    else:
        config = _config(base, train, changed, chosen)
        folder = create_folder(config, Path(chosen.output))
    _train(folder, config, chosen)


def _base(early: argparse.Namespace) -> CompareConfig | TrainConfig:
    if early.resume is not None:
        path = Path(early.resume) / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"{early.resume}: no comparison (it has no config.yaml)")
        if "variants" not in read_yaml(path):
            raise ConfigError(f"{early.resume}: no comparison; a run goes on with densely train")
        return CompareConfig.read(path)
    if early.config is not None:
        return CompareConfig.read(Path(early.config))
    if early.recipe is None:
        return TrainConfig()
    if early.recipe in COMPARISONS:
        return COMPARISONS[early.recipe]
    if early.recipe not in RECIPES:
        raise ConfigError(unknown_name("recipe", early.recipe, [*COMPARISONS, *RECIPES]))
    return RECIPES[early.recipe]


def _config(
    base: CompareConfig | TrainConfig, train: TrainConfig, changed: dict[str, Any], chosen: Any
) -> CompareConfig:
    shared = dataclasses.replace(train, **changed)
    name = chosen.name or (base.name if isinstance(base, CompareConfig) else train.recipe)
    variants: dict[str, Any] = {}
    for variant, changes in map(read_variant, chosen.variant or []):
        if variant in variants:
            raise ConfigError(f"--variant '{variant}' is given twice; name each differently")
        variants[variant] = changes
    if not variants and isinstance(base, CompareConfig):
        variants = base.variants
    if not variants:
        raise ConfigError(
            "nothing to compare: name runs, --recipe with one of "
            f"{', '.join(COMPARISONS)}, or variants (see densely compare --help)"
        )
    return CompareConfig(
        name=name, train=shared, variants=variants, seeds=chosen.seeds, split=chosen.split
    )


def _train(folder: Path, config: CompareConfig, chosen: Any) -> None:
    from densely.comparison.compare import compare
    from densely.comparison.page import write_comparison
    from densely.comparison.training import train_all
    from densely.errors import Diverged, Stopped, TrainingError

    go_on = f"go on with: densely compare --resume {shlex.quote(str(folder))}"

    def reporter_for(title: str) -> "Reporter":
        reporter = reporter_of(chosen.quiet, chosen.json)
        reporter.note(title)
        return reporter

    try:
        runs = train_all(folder, config, reporter_for)
    except Stopped as stop:
        raise Stopped(f"stopped and saved; {go_on}", stop.exit_code) from stop
    except Diverged as error:
        raise Diverged(
            f"{error}\nGoing on would end there again: change that variant, or what all share, and "
            "begin a new comparison"
        ) from error
    except TrainingError as error:
        raise TrainingError(f"{error}; {go_on}") from error
    try:
        result = compare(
            runs,
            split=config.split,
            title=config.name,
            device=config.train.device,
            precision=config.train.precision,
            memory_format=config.train.memory_format,
        )
    except KeyboardInterrupt as stop:
        raise Stopped(f"interrupted, with all runs trained; {go_on}", 130) from stop
    _tell(result, write_comparison(result, folder), chosen)


def _judge(runs: list[Path], chosen: Any, has_data: bool) -> None:
    from densely.comparison.compare import compare
    from densely.comparison.page import write_comparison
    from densely.comparison.training import new_folder

    result = compare(
        runs,
        chosen.data if has_data else None,
        split=chosen.split,
        data_dir=chosen.data_dir,
        title=chosen.name or "runs",
        **hardware_of(chosen),
    )
    folder = new_folder(Path(chosen.output), chosen.name or "runs")
    _tell(result, write_comparison(result, folder), chosen)


def _tell(result: "Comparison", page: Path, chosen: Any) -> None:
    from densely.comparison.page import sentence, table

    if chosen.json:
        print(json.dumps(result.to_dict()))
    elif chosen.quiet:
        print(page.parent)
    else:
        print(table(result))
        for pair in result.pairs:
            print(sentence(pair))
        print(f"picture:   {page.parent / 'comparison.png'}")
        print(f"tables:    {page}")
