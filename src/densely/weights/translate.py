"""What the tensors of a file or a `state_dict` are: their dialect, and the place of each."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from densely.errors import WeightsError
from densely.weights.dialects import (
    DIALECTS,
    OURS,
    Dialect,
    Found,
    Place,
    candidates,
    named_dialect,
)
from densely.weights.files import Contents, read_weights, unwrapped
from densely.words import listed

Source = str | os.PathLike[str] | Mapping[str, Any]
#: Key of a safetensors file's metadata for the epsilon of the norms, where it is not the usual.
EPS_KEY = "densely.norm_eps"
HEAD_KERNEL = Place("head", 0, 0, "classifier", "weight")


@dataclass(frozen=True)
class Translated:
    """Weights by place, in PyTorch's layout, with where they came from.

    `unexpected` are tensors by keys that are no part of a DenseNet, and `trunk` those keys of them
    that stand among its blocks, where no head can be.
    """

    weights: dict[Place, Tensor]
    unexpected: dict[str, Tensor]
    trunk: frozenset[str]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    dialect: Dialect
    prefix: str
    norm_eps: float | None


def places_of(state: Mapping[str, Tensor]) -> dict[Place, str] | None:
    """The keys of a DenseNet's own `state_dict` by place; None where it is not one as a whole.

    What a wrapper such as DistributedDataParallel puts before all of them does not matter.
    """
    found = assign(state)
    return found.places if found is not None and not found.others else None


class Assigned(NamedTuple):
    """Keys of a `state_dict` by place, and those that are no part of a DenseNet."""

    dialect: Dialect
    prefix: str
    places: dict[Place, str]
    others: list[str]
    head: str | None


def assign(
    state: Mapping[str, Tensor], found: Sequence[Found] | None = None, *, within: bool = False
) -> Assigned | None:
    """Say what each tensor of a `state_dict` is; None where no DenseNet is in it.

    A single linear layer that reads as many features as the last norm gives is the head, whatever
    it is called: `fc`, `classifier.1`.

    Args:
        state: tensors by name.
        found: dialects and prefixes that may fit, the best first; None for all that do.
        within: the head is within the prefix.
    """
    found = candidates(state) if found is None else found
    if not found:
        return None
    dialect, prefix, _ = found[0]
    places: dict[Place, str] = {}
    others = []
    for key in state:
        place = dialect.place_of(key[len(prefix) :]) if key.startswith(prefix) else None
        if place is None or place in places:
            others.append(key)
        else:
            places[place] = key
    head = None
    last = places.get(Place("final", 0, 0, "norm5", "weight"))
    may_be = [key for key in others if not within or key.startswith(prefix)]
    modules = {key.rpartition(dialect.separator)[0] for key in may_be}
    variables = {dialect.variables.get(key.rpartition(dialect.separator)[2]) for key in may_be}
    if len(modules) == 1 and variables == {"weight", "bias"} and last and len(may_be) == 2:
        named = {Place("head", 0, 0, "classifier", _variable(dialect, key)): key for key in may_be}
        kernel = state[named[HEAD_KERNEL]]
        features = 0 if dialect.is_keras else 1
        if (
            kernel.dim() == 2
            and state[last].dim() == 1
            and kernel.shape[features] == state[last].shape[0]
            and not named.keys() & places.keys()
        ):
            places, head = places | named, modules.pop()
            others = [key for key in others if key not in may_be]
    return Assigned(dialect, prefix, places, others, head)


def _variable(dialect: Dialect, key: str) -> str:
    return dialect.variables[key.rpartition(dialect.separator)[2]]


def translate(contents: Contents, where: str, dialect: str, prefix: str | None) -> Translated:
    """Find the dialect of a file's keys, and say what each of its tensors is.

    Raises:
        WeightsError: no dialect fits, or more than one network is in the file.
        ConfigError: an unknown dialect.
    """
    known: Iterable[Dialect] = DIALECTS.values()
    if dialect != "auto":
        known = [named_dialect(dialect, "auto")]
    keys = list(contents.tensors)
    found = candidates(keys, known)
    networks = found
    if prefix is not None:
        found = [one for one in found if one.prefix.rstrip("./") == prefix.rstrip("./")]
    assigned = assign(contents.tensors, found, within=prefix is not None)
    if assigned is None:
        shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
        anchors = list(dict.fromkeys(one.anchor for one in known))
        raise WeightsError(
            f"{where}: no weights of a DenseNet"
            + ("" if prefix is None else f" below '{prefix}'")
            + f": no first convolution with dense layers after it, such as {', '.join(anchors)}, "
            f"among its {len(keys)} tensors ({shown})"
        )
    best = found[0]
    rivals = [
        one.prefix
        for one in found
        if one.dialect is best.dialect and 2 * one.explained > best.explained
    ]
    if prefix is None and len(rivals) > 1:
        raise WeightsError(
            f"{where}: holds several networks; name one with prefix=: "
            + ", ".join(repr(rival) for rival in rivals[:6])
        )
    weights = {
        place: best.dialect.to_torch(place, contents.tensors[key])
        for place, key in assigned.places.items()
    }
    beginnings = {
        _beginning(key, best)
        for place, key in assigned.places.items()
        if place.kind not in ("head", "final")
    }
    trunk = {k for k in assigned.others if k.startswith(best.prefix)}
    trunk = {key for key in trunk if _beginning(key, best) in beginnings}
    ignored = [f"{key} ({what})" for key, what in contents.ignored.items()]
    unexpected: dict[str, Tensor] = {}
    inner = tuple(
        one.prefix
        for one in networks
        if one.dialect is best.dialect and len(one.prefix) > len(best.prefix)
    )
    for key in assigned.others:
        inside = key.startswith(best.prefix) and not key.startswith(inner)
        if key[len(best.prefix) :] in best.dialect.extras or (prefix is not None and not inside):
            ignored.append(key)
        else:
            unexpected[key] = contents.tensors[key]
    notes = () if assigned.head is None else (f"head: {assigned.head}",)
    eps = best.dialect.norm_eps if best.dialect.is_keras else None
    if EPS_KEY in contents.metadata:
        eps = _positive(contents.metadata[EPS_KEY], where)
    return Translated(
        weights,
        unexpected,
        frozenset(trunk),
        tuple(ignored),
        notes,
        best.dialect,
        best.prefix,
        eps,
    )


def _beginning(key: str, found: Found) -> str:
    """The outermost module within the network that a key belongs to."""
    return key[len(found.prefix) :].partition(found.dialect.separator)[0]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by its own keys.

    Raises:
        WeightsError: a part of it has no shape yet.
    """
    state = model.state_dict()
    lazy = [key for key, value in state.items() if is_lazy(value)]
    if lazy:
        raise WeightsError(
            f"{type(model).__name__}: {listed(lazy)} have no shape before it has seen images: "
            "call it once first"
        )
    return state


def contents_of(source: Source) -> tuple[Contents, str]:
    """What a file or a checkpoint in memory holds, and what to call it.

    Raises:
        WeightsError: as `load_weights`.
    """
    if isinstance(source, Mapping):
        try:
            tensors, ignored = unwrapped(source)
        except WeightsError as error:
            raise WeightsError(f"state_dict: {error}") from error
        return Contents(tensors, ignored), "state_dict"
    if not isinstance(source, str | os.PathLike):
        raise WeightsError(f"{type(source).__name__}: expected a file or a state_dict")
    return read_weights(Path(source)), os.fspath(source)


def _positive(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise WeightsError(f"{where}: {EPS_KEY}={text[:40]!r}: expected a small number above 0")
    return value


def key_of(place: Place) -> str:
    """What densely calls a place."""
    return OURS.name_of(place) or str(place)
