"""Whether arguments of a network, as code, a YAML file or a flag gives them, have right types."""

import types
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from densely.errors import ConfigError

Init = TypeVar("Init", bound=Callable[..., None])

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def check_types(network: type, given: dict[str, Any]) -> None:
    """Hold arguments against the annotations of a class; values aside.

    Args:
        network: the class.
        given: its arguments by their names; what else is there, as in `locals()`, is passed over.

    Raises:
        ConfigError: some are of other types; all are named at once.
    """
    hints = get_type_hints(network.__init__)  # type: ignore[misc]
    if faults := [
        f"{name}={given[name]!r}: must be {_named(hint)}"
        for name, hint in hints.items()
        if name in given and not _fits(given[name], hint)
    ]:
        raise ConfigError("; ".join(faults))


def of_plain_numbers(init: Init) -> Init:
    """An `__init__` that is given Python's own numbers where numpy's were given, or fractions.

    Those of a fixed width run over, compilers take them for data, and JSON knows none.
    """

    @wraps(init)
    def run(*args: Any, **kwargs: Any) -> None:
        init(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})

    return cast(Init, run)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def is_whole(value: object) -> bool:
    """Whether it is a whole number, numpy's too; true and false are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is Literal:
        return isinstance(value, str)  # which ones there are, the network says
    if kind is Sequence:
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return is_list and all(_fits(each, inner[0]) for each in value)
    if hint is int:
        return is_whole(value)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint is type(None):
        return value is None
    return callable(value)


def _named(hint: Any) -> str:
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_named, inner)))
    if kind is Literal:
        return " or ".join(f"'{name}'" for name in inner)
    if kind is Sequence:
        return f"a list, each {_named(inner[0])}"
    return _NAMES.get(hint, "a function")
