"""Weights of any dialect into a model: all of them or none, and nothing skipped in silence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from densely.errors import ConfigError, WeightsError
from densely.models.densenet import set_norm_eps
from densely.weights.dialects import Place
from densely.weights.explain import explain
from densely.weights.files import Contents
from densely.weights.stem import adapt_stem
from densely.weights.translate import (
    HEAD_KERNEL,
    Source,
    Translated,
    assign,
    contents_of,
    fits,
    key_of,
    translate,
)

_COUNT = "num_batches_tracked"
_STEM_KERNEL = Place("stem", 0, 0, "conv0", "weight")


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
        source: a file (safetensors, .pt, .pth, .tar, .h5), a state_dict, or a checkpoint with one
            in it.
        dialect: whose names the source has: "auto" finds out by its keys; else "torchvision",
            "torchvision_legacy", "monai", "keras", "efficient", "andreasveit", "bamos".
        head: "skip" leaves the model's classifier as it is; "auto" does so where the number of
            classes is another one. A single linear layer of another name is taken for the head.
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
    faults = [
        f"{name}={value!r}: must be one of {', '.join(known)}"
        for name, value, known in (
            ("head", head, ("load", "skip", "auto")),
            ("stem", stem, ("strict", "adapt")),
        )
        if value not in known
    ]
    if not isinstance(model, nn.Module):
        faults.append(f"model is a {type(model).__name__}: must be a network")
    if faults:
        raise ConfigError("; ".join(faults))
    contents, where = contents_of(source)
    own = model.state_dict()
    target = assign(own)
    if target is None:
        return load_by_name(model, contents, where, dialect, head=head)
    found = translate(contents, where, dialect, prefix)
    weights, places, notes = dict(found.weights), dict(target.places), list(found.notes)
    unexpected, missing_heads = list(found.unexpected), list(target.others)
    skipped: list[str] = []
    if head == "auto":
        expected = _classes({place: own[key] for place, key in places.items()})
        head = "load" if _classes(weights) == expected and not missing_heads else "skip"
    if head == "skip":
        skipped = [key_of(place) for place in weights if place.kind == "head"]
        skipped += [key for key in unexpected if key not in found.trunk]
        unexpected = [key for key in unexpected if key in found.trunk]
        weights = {place: value for place, value in weights.items() if place.kind != "head"}
        places = {place: key for place, key in places.items() if place.kind != "head"}
        missing_heads = []

    prepared: dict[str, Tensor] = {}
    missing: list[Place] = []
    wrong: list[tuple[Place, Tensor, Tensor]] = []
    casts: dict[str, int] = {}
    for place, key in places.items():
        aim = own[key]
        if place not in weights:
            if place.variable == _COUNT:
                prepared[key] = torch.zeros_like(aim)
            else:
                missing.append(place)
            continue
        value = weights[place]
        if stem == "adapt" and place == _STEM_KERNEL and value.dim() == aim.dim():
            adapted = adapt_stem(value, aim.shape[1]) if value.shape[1] else value
            if adapted is not value:
                notes.append(f"stem adapted from {value.shape[1]} to {aim.shape[1]} channels")
            value = adapted
        if not fits(value, aim):
            wrong.append((place, value, aim))
            continue
        if value.dtype != aim.dtype:
            cast = f"{value.dtype} to {aim.dtype}".replace("torch.", "")
            casts[cast] = casts.get(cast, 0) + 1
        prepared[key] = value
    unexpected += [key_of(place) for place in weights if place not in places]
    if missing or wrong or unexpected or missing_heads:
        message = explain(
            where,
            found.dialect.name,
            found.weights,
            {place: own[key] for place, key in places.items()},
            missing=[key_of(place) for place in missing] + missing_heads,
            wrong=[(key_of(place), value, aim) for place, value, aim in wrong],
            unexpected=unexpected,
        )
        if missing_heads:
            inside = target.prefix.rstrip(".")
            message += "\n  the model is more than a DenseNet: " + (
                f"pass the DenseNet in it ({inside}), or " if inside else "pass "
            )
            message += "head='skip' to leave these as they are"
        if prefix is None and unexpected and found.prefix and not found.trunk & {*unexpected}:
            message += f"\n  pass prefix='{found.prefix}' to leave out what stands beside it"
        raise WeightsError(message)
    if any(value.is_meta for value in own.values()):
        raise WeightsError(
            f"{where}: fits, but the model is on the meta device and holds no numbers: call "
            "model.to_empty(device='cpu') first"
        )
    if any(place.variable == _COUNT and place not in weights for place in places):
        notes.append("numbers of batches seen are not in the source: set to 0")
    notes += [f"{count} tensors cast from {cast}" for cast, count in casts.items()]
    model.load_state_dict(own | prepared)
    notes += _settle_eps(model, found)
    return LoadReport(
        where,
        found.dialect.name,
        found.prefix,
        len(prepared),
        tuple(skipped),
        found.ignored,
        tuple(notes),
    )


def _settle_eps(model: nn.Module, found: Translated) -> list[str]:
    """The source decides the norms' epsilon where it knows; else the model's stays, and is told."""
    if found.norm_eps is not None:
        set_norm_eps(model, found.norm_eps)
        return [f"epsilon of the norms set to the source's, {found.norm_eps:g}"]
    values = (getattr(module, "eps", None) for module in model.modules())
    own = {value for value in values if isinstance(value, float)}
    if own == {found.dialect.norm_eps}:
        return []
    told = ", ".join(f"{value:g}" for value in sorted(own))
    return [
        f"epsilon of the norms stays the model's, {told}: the source does not say "
        f"({found.dialect.name} has {found.dialect.norm_eps:g})"
    ]


def load_by_name(
    model: nn.Module,
    contents: Contents,
    where: str,
    dialect: str,
    *,
    head: Literal["load", "skip", "auto"],
) -> LoadReport:
    """Load a network of another kind, such as FC-DenseNet: its keys must be the file's.

    Raises:
        WeightsError: as `load_weights`.
    """
    if dialect not in ("auto", "densely"):
        raise WeightsError(f"{type(model).__name__}: no DenseNet: has no dialects but densely's")
    own, tensors = model.state_dict(), contents.tensors
    prefixes = {
        key[: -len(name)] for name in list(own)[:1] for key in tensors if key.endswith(name)
    }
    prefix = next((p for p in prefixes if all(key.startswith(p) for key in tensors)), "")
    tensors = {key[len(prefix) :]: value for key, value in tensors.items()}
    expected, skipped = dict(own), []
    heads = [key for key in own if key.startswith("classifier.")]
    if head == "auto":
        same = all(key in tensors and fits(tensors[key], own[key]) for key in heads)
        head = "load" if same else "skip"
    if head == "skip":
        skipped = [key for key in tensors if key.startswith("classifier.")]
        tensors = {key: value for key, value in tensors.items() if key not in skipped}
        expected = {key: value for key, value in own.items() if key not in heads}
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    wrong = [
        (key, tensors[key], value)
        for key, value in expected.items()
        if key in tensors and not fits(tensors[key], value)
    ]
    if missing or unexpected or wrong:
        raise WeightsError(
            explain(where, "densely", {}, {}, missing=missing, wrong=wrong, unexpected=unexpected)
        )
    model.load_state_dict(own | tensors)
    ignored = tuple(f"{key} ({what})" for key, what in contents.ignored.items())
    return LoadReport(where, "densely", prefix, len(tensors), tuple(skipped), ignored)


def _classes(weights: Mapping[Place, Tensor]) -> int | None:
    head = weights.get(HEAD_KERNEL)
    return None if head is None or head.dim() == 0 else head.shape[0]
