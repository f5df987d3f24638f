"""Flags from the fields of a config, and faults as one line."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from densely.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from densely.bench.config import BenchConfig
    from densely.training.config import TrainConfig


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, an absent one as it is written on the command line and in YAML."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        return text.replace("%(default)s", "null") if text and action.default is None else text


class Parser(ArgumentParser):
    """Faults as one line, through the same door as all other errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong as a ConfigError."""
        message = " ".join(message.split())
        if found := re.fullmatch(r'Parser key "(\w+)": (.*)', message):
            key, reason = found.groups()
            message = f"{flag_of(key)}: {_in_plain_words(reason)}"
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


def flag_of(name: str) -> str:
    """The flag of a field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


def read_first(arguments: Sequence[str], *flags: str) -> tuple[argparse.Namespace, list[str]]:
    """Values of the flags that decide the defaults of others, and the arguments that remain.

    They are read before all else, so that --help shows the defaults that will hold.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in flags:
        first.add_argument(flag)
    try:
        return first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error


def changed_fields(base: "TrainConfig", chosen: Any) -> dict[str, Any]:
    """Fields whose flags say something else than `base`; the recipe is no field of its own."""
    return {
        field.name: getattr(chosen, field.name)
        for field in dataclasses.fields(base)
        if field.name != "recipe" and getattr(chosen, field.name) != getattr(base, field.name)
    }


def hardware_of(chosen: Any) -> dict[str, Any]:
    """What the flags say of the hardware, as functions take it."""
    return {name: chosen[name] for name in ("device", "precision", "memory_format")}


def add_fields(
    parser: Parser, base: "TrainConfig | BenchConfig", groups: Sequence[str] = ()
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
        hint, flag = hints[field.name], flag_of(field.name)
        options = {"default": getattr(base, field.name), "help": field.metadata["help"]}
        if hint is bool:
            titled[title].add_argument(flag, action=ActionYesNo(no_prefix="no-"), **options)
        else:
            titled[title].add_argument(flag, type=hint, metavar=_metavar(hint), **options)


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    if get_origin(hint) is dict:
        return "{NAME: VALUE}"
    kinds = set(get_args(hint)) or {hint}
    return "N" if int in kinds else "X" if float in kinds else "TEXT"
