"""Weights of any dialect into a model: all of them or none, and nothing skipped in silence."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from densely.errors import ConfigError, WeightsError, unknown_name
from densely.models.densenet import set_norm_eps
from densely.weights.dialects import ALIASES, DIALECTS, OURS, Dialect, Place, candidates
from densely.weights.explain import explain
from densely.weights.files import Contents, read_weights
from densely.weights.stem import adapt_stem

Source = str | os.PathLike[str] | Mapping[str, Tensor]
#: Key of a safetensors file's metadata for the epsilon of the norms, where it is not the usual.
EPS_KEY = "densely.norm_eps"
_COUNT = "num_batches_tracked"


@dataclass(frozen=True)
class LoadReport:
    """What was loaded and how; `print` it.

    Args:
        source: the file, or "state_dict".
        dialect: whose names it had.
        prefix: what a wrapper had put before them.
        loaded: number of tensors that went into the model.
        skipped: keys of the head, where it was asked to be skipped.
        ignored: entries of the file that are no weights of this network, and what they are.
        notes: what was changed on the way, in words.
    """

    source: str
    dialect: str
    prefix: str
    loaded: int
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors from {self.source}, dialect {self.dialect}"]
        if self.prefix:
            lines[0] += f", below '{self.prefix}'"
        if self.skipped:
            lines.append(f"skipped, as asked: {', '.join(self.skipped)}")
        if self.ignored:
            lines.append(f"not of this network: {', '.join(self.ignored)}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Translated:
    """Weights by place, in PyTorch's layout, with where they came from."""

    weights: dict[Place, Tensor]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    dialect: Dialect
    prefix: str
    norm_eps: float | None


def load_weights(
    model: nn.Module,
    source: Source,
    dialect: str = "auto",
    *,
    head: Literal["load", "skip", "auto"] = "load",
    stem: Literal["strict", "adapt"] = "strict",
    prefix: str | None = None,
) -> LoadReport:
    """Load weights of any known dialect into a DenseNet, strictly: all or nothing.

    Args:
        model: densely's, or a DenseNet of torchvision, timm or MONAI.
        source: a file (safetensors, .pt, .pth, .tar, .h5), or a state_dict.
        dialect: whose names the source has: "auto" finds out by its keys; else "torchvision",
            "torchvision_legacy", "monai", "keras", "efficient", "andreasveit", "bamos".
        head: "skip" leaves the model's classifier as it is; "auto" does so where the number of
            classes is another one.
        stem: "adapt" fits a first convolution for other numbers of channels (`adapt_stem`).
        prefix: what stands before the network's keys, such as "encoder."; keys without it are left
            out and named in the report. None finds a wrapper's prefix and leaves nothing out.

    Returns:
        What was loaded, skipped and changed on the way.

    Raises:
        WeightsError: the source is missing, damaged or unsafe, or does not fit: each missing,
            unexpected or wrong key is named, with the nearest explanation. The model is as it was.
        ConfigError: an unknown dialect, or a wrong value of another argument.
    """
    if head not in ("load", "skip", "auto"):
        raise ConfigError(f"head='{head}': must be 'load', 'skip' or 'auto'")
    if stem not in ("strict", "adapt"):
        raise ConfigError(f"stem='{stem}': must be 'strict' or 'adapt'")
    contents, where = _contents(source)
    own = model.state_dict()
    places = places_of(own)
    if places is None:
        return _load_as_it_is(model, own, contents, where)
    found = translate(contents, where, dialect, prefix)
    weights, notes = found.weights, []
    skipped: tuple[str, ...] = ()
    if head == "auto":
        expected = _classes({place: own[key] for place, key in places.items()})
        head = "load" if _classes(weights) == expected else "skip"
    if head == "skip":
        skipped = tuple(key_of(place) for place in weights if place.kind == "head")
        weights = {place: value for place, value in weights.items() if place.kind != "head"}
        places = {place: key for place, key in places.items() if place.kind != "head"}

    prepared: dict[str, Tensor] = {}
    missing: list[Place] = []
    wrong: list[tuple[Place, Tensor, Tensor]] = []
    casts: dict[str, int] = {}
    for place, key in places.items():
        target = own[key]
        if place not in weights:
            if place.variable == _COUNT:
                prepared[key] = torch.zeros_like(target)
            else:
                missing.append(place)
            continue
        value = weights[place]
        if stem == "adapt" and place[:4] == ("stem", 0, 0, "conv0") and place.variable == "weight":
            adapted = value
            if value.dim() == target.dim() and value.shape[1] > 0:
                adapted = adapt_stem(value, target.shape[1])
            if adapted is not value:
                notes.append(f"stem adapted from {value.shape[1]} to {target.shape[1]} channels")
            value = adapted
        if not fits(value, target):
            wrong.append((place, value, target))
            continue
        if value.dtype != target.dtype:
            cast = f"{value.dtype} to {target.dtype}".replace("torch.", "")
            casts[cast] = casts.get(cast, 0) + 1
        prepared[key] = value
    unexpected = list(found.unexpected) + [key_of(p) for p in weights if p not in places]
    if missing or wrong or unexpected:
        raise WeightsError(
            explain(
                where,
                found.dialect.name,
                found.weights,
                {place: own[key] for place, key in places.items()},
                missing=[key_of(place) for place in missing],
                wrong=[(key_of(place), value, target) for place, value, target in wrong],
                unexpected=unexpected,
            )
        )
    if any(place.variable == _COUNT and place not in weights for place in places):
        notes.append("numbers of batches seen are not in the source: set to 0")
    notes += [f"{count} tensors cast from {cast}" for cast, count in casts.items()]
    model.load_state_dict(own | prepared)
    if found.norm_eps is not None:
        set_norm_eps(model, found.norm_eps)
        notes.append(f"epsilon of the norms set to the source's, {found.norm_eps:g}")
    return LoadReport(
        where,
        found.dialect.name,
        found.prefix,
        len(prepared),
        skipped,
        found.ignored,
        tuple(notes),
    )


def places_of(state: Mapping[str, object]) -> dict[Place, str] | None:
    """The keys of a DenseNet's own `state_dict` by place; None where they are no DenseNet's.

    What a wrapper such as DistributedDataParallel puts before all of them does not matter.
    """
    for found in candidates(state):
        if found.explained == len(state):
            return {_place(found.dialect, key[len(found.prefix) :]): key for key in state}
    return None


def translate(contents: Contents, where: str, dialect: str, prefix: str | None) -> Translated:
    """Find the dialect of a file's keys, and say what each of its tensors is.

    Raises:
        WeightsError: no dialect fits, or more than one network is in the file.
        ConfigError: an unknown dialect.
    """
    known: Iterable[Dialect] = DIALECTS.values()
    if dialect != "auto":
        name = ALIASES.get(dialect, dialect)
        if name not in DIALECTS:
            raise ConfigError(unknown_name("dialect", dialect, ["auto", *DIALECTS, *ALIASES]))
        known = [DIALECTS[name]]
    keys = list(contents.tensors)
    found = candidates(keys, known)
    if prefix is not None:
        found = [one for one in found if one.prefix == prefix]
    if not found:
        shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
        raise WeightsError(
            f"{where}: no weights of a DenseNet"
            + ("" if prefix is None else f" below '{prefix}'")
            + f": no first convolution such as {', '.join(d.anchor for d in list(known)[:4])} "
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
    weights: dict[Place, Tensor] = {}
    unexpected, ignored = [], [f"{key} ({what})" for key, what in contents.ignored.items()]
    for key, value in contents.tensors.items():
        inside = key.startswith(best.prefix)
        name = key[len(best.prefix) :] if inside else key
        place = best.dialect.place_of(name) if inside else None
        if place is not None and place not in weights:
            weights[place] = best.dialect.to_torch(place, value)
        elif (prefix is not None and not inside) or name in best.dialect.extras:
            ignored.append(key)
        else:
            unexpected.append(key)
    eps = best.dialect.norm_eps if best.dialect.is_keras else None
    if EPS_KEY in contents.metadata:
        eps = _positive(contents.metadata[EPS_KEY], where)
    return Translated(weights, tuple(unexpected), tuple(ignored), best.dialect, best.prefix, eps)


def _contents(source: Source) -> tuple[Contents, str]:
    if isinstance(source, Mapping):
        wrong = [str(key) for key, value in source.items() if not isinstance(value, Tensor)]
        if wrong:
            raise WeightsError(f"state_dict: no tensors: {', '.join(wrong[:5])}")
        return Contents({str(key): value for key, value in source.items()}), "state_dict"
    if not isinstance(source, str | os.PathLike):
        raise WeightsError(f"{type(source).__name__}: expected a file or a state_dict")
    return read_weights(Path(source)), os.fspath(source)


def _load_as_it_is(
    model: nn.Module, own: dict[str, Tensor], contents: Contents, where: str
) -> LoadReport:
    """A network of another kind, such as FC-DenseNet: its keys must be the file's."""
    tensors = contents.tensors
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    wrong = [
        (key, tensors[key], value)
        for key, value in own.items()
        if key in tensors and not fits(tensors[key], value)
    ]
    if missing or unexpected or wrong:
        message = explain(
            where, "densely", {}, {}, missing=missing, wrong=wrong, unexpected=unexpected
        )
        if inside := candidates(own):
            part = inside[0].prefix.rstrip(".") or "features and head"
            message += f"\n  the model is more than a DenseNet: pass the DenseNet in it ({part})"
        raise WeightsError(message)
    model.load_state_dict(tensors)
    ignored = tuple(f"{key} ({what})" for key, what in contents.ignored.items())
    return LoadReport(where, "densely", "", len(own), ignored=ignored)


def fits(value: Tensor, target: Tensor) -> bool:
    """Whether `value` can be copied into `target`: same shape and kind of numbers, all there."""
    return (
        value.shape == target.shape
        and value.layout == torch.strided
        and not value.is_quantized
        and not (value.is_meta and not target.is_meta)
        and not value.is_complex()
        and value.dtype != torch.bool
        and value.is_floating_point() == target.is_floating_point()
    )


def _classes(weights: Mapping[Place, Tensor]) -> int | None:
    head = weights.get(Place("head", 0, 0, "classifier", "weight"))
    return None if head is None or head.dim() == 0 else head.shape[0]


def _positive(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise WeightsError(f"{where}: {EPS_KEY}={text!r}: expected a small number above 0")
    return value


def _place(dialect: Dialect, key: str) -> Place:
    place = dialect.place_of(key)
    assert place is not None
    return place


def key_of(place: Place) -> str:
    """What densely calls a place."""
    return OURS.name_of(place) or str(place)
