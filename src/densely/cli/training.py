"""`densely train`."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from densely.cli.parser import Parser, add_fields, changed_fields, flag_of, read_first
from densely.errors import ConfigError
from densely.training.config import FREE_ON_RESUME, RECIPES, TrainConfig, read_yaml

if TYPE_CHECKING:
    from densely.training.reporting import Reporter


def train(parser: Parser, arguments: list[str]) -> None:
    """Train a network and write a run directory: weights, curves, metrics, model card.

    Values come from a recipe, then from a YAML file, then from flags: the later ones win. Without
    any, the quick start learns handwritten digits in less than a minute.
    """
    early, rest = read_first(arguments, "--recipe", "--config", "--resume")
    if early.resume is not None:
        if early.recipe is not None or early.config is not None:
            raise ConfigError("--resume takes recipe and config from the run; leave them out")
        from densely.training.run import RunDirectory

        base = RunDirectory.open(Path(early.resume)).config()
    else:
        values = read_yaml(Path(early.config)) if early.config is not None else {}
        if early.recipe is not None:
            TrainConfig.from_values({"recipe": early.recipe})  # no fault of the file's
            values["recipe"] = early.recipe
        try:
            base = TrainConfig.from_values(values)
        except ConfigError as error:
            if early.config is None:
                raise
            raise ConfigError(f"{early.config}: {error}") from error

    source = parser.add_argument_group("where values come from")
    source.add_argument(
        "--recipe", metavar="NAME", default=base.recipe, help=f"one of {', '.join(RECIPES)}"
    )
    source.add_argument("--config", metavar="FILE", help="YAML file with some of the values below")
    source.add_argument("--resume", metavar="RUN", help="go on with a stopped run")
    add_fields(parser, base)
    add_voices(parser)
    chosen = parser.parse_args(rest)

    changed = changed_fields(base, chosen)
    if early.resume is not None and (fixed := sorted(set(changed) - {*FREE_ON_RESUME})):
        raise ConfigError(
            f"{', '.join(map(flag_of, fixed))}: fixed by the run {early.resume}; with --resume "
            f"only {', '.join(map(flag_of, sorted(FREE_ON_RESUME)))} may change"
        )
    config = dataclasses.replace(base, **changed)

    from densely.training.loop import train

    train(
        config,
        resume=Path(early.resume) if early.resume is not None else None,
        reporter=reporter_of(chosen.quiet, chosen.json),
    )


def add_voices(parser: Parser) -> None:
    """Give a command that trains its flags for what it prints."""
    group = parser.add_argument_group("what it prints")
    group.add_argument("--quiet", action="store_true", help="only the run directory, at the end")
    group.add_argument("--json", action="store_true", help="a JSON object a line")


def reporter_of(quiet: bool, as_json: bool) -> "Reporter":
    """The voice that these flags ask for."""
    from densely.training import reporting

    if quiet and as_json:
        raise ConfigError("--quiet and --json exclude each other")
    if quiet:
        return reporting.Reporter()
    if as_json:
        return reporting.JsonReporter()
    return reporting.BarReporter() if sys.stdout.isatty() else reporting.PlainReporter()
