"""Weights of any dialect into a model: all of them or none, and nothing skipped in silence."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from densely.errors import ConfigError, WeightsError
from densely.models.densenet import norm_eps, set_norm_eps
from densely.weights.compare import fits, mismatch
from densely.weights.dialects import Place
from densely.weights.explain import explain, require_fit
from densely.weights.files import Contents
from densely.weights.stem import adapt_stem
from densely.weights.translate import (
    HEAD_KERNEL,
    Assigned,
    Source,
    Translated,
    assign,
    contents_of,
    key_of,
    state_of,
    translate,
)
from densely.words import listed

Head = Literal["load", "skip", "auto"]
StemFit = Literal["strict", "adapt"]
_STEM_KERNEL = Place("stem", 0, 0, "conv0", "weight")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded and how; `print` it.

    Args:
        source: the file, or "state_dict".
        dialect: whose names it had.
        prefix: what a wrapper had put before them.
        loaded: number of tensors that went into the model.
        skipped: keys of the source's head, where it was not loaded.
        fresh: keys of the model that stay as they were.
        ignored: entries of the file that are no weights of this network, and what they are.
        notes: what was changed on the way, in words.
    """

    source: str
    dialect: str
    prefix: str
    loaded: int
    skipped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors from {self.source}, dialect {self.dialect}"]
        if self.prefix:
            lines[0] += f", below '{self.prefix}'"
        if self.skipped:
            lines.append(f"not loaded: {listed(self.skipped)}")
        if self.fresh:
            lines.append(f"stay as they were: {listed(self.fresh)}")
        if self.ignored:
            lines.append(f"not of this network: {listed(self.ignored)}")
        return "\n".join([*lines, *self.notes])


def load_weights(
    model: nn.Module,
    source: Source,
    dialect: str = "auto",
    *,
    head: Head = "load",
    stem: StemFit = "strict",
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
            ("head", head, get_args(Head)),
            ("stem", stem, get_args(StemFit)),
        )
        if value not in known
    ]
    if not isinstance(model, nn.Module):
        faults.append(f"model is a {type(model).__name__}: must be a network")
    if faults:
        raise ConfigError("; ".join(faults))
    contents, where = contents_of(source)
    target = assign(state_of(model))
    if target is None:
        if prefix is not None or stem != "strict":
            raise ConfigError(f"{type(model).__name__}: no DenseNet: prefix and stem are for those")
        return load_by_name(model, contents, where, dialect, head=head)
    found = translate(contents, where, dialect, prefix)
    return _load(model, target, found, where, head, stem)


def load_translated(
    model: nn.Module,
    found: Translated,
    where: str,
    *,
    head: Head = "load",
    stem: StemFit = "strict",
    keep_eps: bool = False,
) -> LoadReport:
    """`load_weights` into a DenseNet, for those who have translated the source already.

    Args:
        model: as `load_weights`.
        found: the translated source.
        where: what to call it.
        head: as `load_weights`.
        stem: likewise.
        keep_eps: the model's epsilon of the norms stays, whatever the source's is.

    Raises:
        WeightsError: as `load_weights`.
    """
    target = assign(model.state_dict())
    assert target is not None
    return _load(model, target, found, where, head, stem, keep_eps)


def _load(
    model: nn.Module,
    target: Assigned,
    found: Translated,
    where: str,
    head: Head,
    stem: StemFit,
    keep_eps: bool = False,
) -> LoadReport:
    own = model.state_dict()
    wanted = {place: own[key] for place, key in target.places.items()}
    weights, notes = dict(found.weights), list(found.notes)
    unexpected, others = list(found.unexpected), list(target.others)
    skipped, fresh = [], []
    if head == "auto":
        head = "load" if _classes(weights) == _classes(wanted) and not others else "skip"
    if head == "skip":
        skipped = [key_of(place) for place in weights if place.kind == "head"]
        skipped += [key for key in unexpected if key not in found.trunk]
        unexpected = [key for key in unexpected if key in found.trunk]
        fresh = [target.places[place] for place in wanted if place.kind == "head"] + others
        weights, wanted, others = _without_head(weights), _without_head(wanted), []
    if stem == "adapt":
        notes += _adapt(weights, wanted)
    same = _of_one_name(target, own, others, found)  # what the model has beside its DenseNet
    others = [key for key in others if key not in same]
    unexpected = [key for key in unexpected if key not in same.values()]

    counts = require_fit(
        found,
        weights,
        wanted,
        where,
        missing=others,
        unexpected=unexpected,
        hint=_way_out(target, others, found),
    )
    _require_numbers(own, where)
    if counts:
        notes.append(f"{len(counts)} numbers of batches seen are not in the source: set to 0")
    notes += _casts({place: found.weights[place] for place in weights}, wanted)
    notes += _not_finite(weights, wanted)
    weights |= {place: torch.zeros_like(wanted[place]) for place in counts}
    model.load_state_dict(
        own
        | {target.places[place]: value for place, value in weights.items()}
        | {key: found.unexpected[theirs] for key, theirs in same.items()}
    )
    notes += _settle_eps(model, found, keep_eps)
    return LoadReport(
        where,
        found.dialect.name,
        found.prefix,
        len(wanted) + len(same),
        tuple(skipped),
        tuple(fresh),
        found.ignored,
        tuple(notes),
    )


def _of_one_name(
    target: Assigned, own: Mapping[str, Tensor], others: Sequence[str], found: Translated
) -> dict[str, str]:
    """Keys of the model, and of the source, of tensors beside the DenseNet that fit each other."""
    return {
        key: theirs
        for key in others
        for theirs in (found.prefix + key.removeprefix(target.prefix), key)
        if theirs in found.unexpected and fits(found.unexpected[theirs], own[key])
    }


def _require_numbers(own: Mapping[str, Tensor], where: str) -> None:
    if any(value.is_meta for value in own.values()):
        raise WeightsError(
            f"{where}: fits, but the model is on the meta device and holds no numbers: call "
            "model.to_empty(device='cpu') first"
        )


def _without_head(weights: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    return {place: value for place, value in weights.items() if place.kind != "head"}


def _adapt(weights: dict[Place, Tensor], wanted: Mapping[Place, Tensor]) -> list[str]:
    """Fit the first convolution in `weights` for as many channels as are wanted."""
    kernel, aim = weights.get(_STEM_KERNEL), wanted.get(_STEM_KERNEL)
    if kernel is None or aim is None or kernel.dim() != aim.dim() or not kernel.shape[1]:
        return []
    if kernel.shape[1] == aim.shape[1]:
        return []
    weights[_STEM_KERNEL] = adapt_stem(kernel.to(aim.dtype), aim.shape[1])  # float8 has no sums
    return [f"stem adapted from {kernel.shape[1]} to {aim.shape[1]} channels"]


def _casts(weights: Mapping[Place, Tensor], wanted: Mapping[Place, Tensor]) -> list[str]:
    """How many tensors change their precision, in words."""
    casts = Counter(
        f"{value.dtype} to {wanted[place].dtype}".replace("torch.", "")
        for place, value in weights.items()
        if value.dtype != wanted[place].dtype
    )
    return [f"{count} tensors cast from {cast}" for cast, count in casts.items()]


def _not_finite(weights: Mapping[Place, Tensor], wanted: Mapping[Place, Tensor]) -> list[str]:
    """How many tensors no network can compute with, in words."""
    diverged = overflown = 0
    for place, value in weights.items():
        if value.to(wanted[place].dtype).isfinite().all():
            continue
        if value.isfinite().all():
            overflown += 1
        else:
            diverged += 1
    notes = []
    if diverged:
        notes.append(
            f"{diverged} tensors hold NaN or infinity: what they were saved from had diverged"
        )
    if overflown:
        notes.append(
            f"{overflown} tensors hold numbers too large for their new precision: infinity"
        )
    return notes


def _way_out(target: Assigned, others: Sequence[str], found: Translated) -> str:
    """What may be passed where more than a DenseNet stands in the model or in the source."""
    told = ""
    if others:
        inside = target.prefix.rstrip(".")
        part = f"pass the DenseNet in it ({inside}), or " if inside else "pass "
        told += f"\n  the model is more than a DenseNet: {part}"
        told += "head='skip' to leave these as they are"
    if not found.trunk and any(not key.startswith(found.prefix) for key in found.unexpected):
        told += f"\n  pass prefix='{found.prefix}' to leave out what stands beside it"
    return told


def _settle_eps(model: nn.Module, found: Translated, keep: bool) -> list[str]:
    """The source decides the norms' epsilon where it knows; else the model's stays, and is told."""
    own = norm_eps(model)
    told = ", ".join(f"{value:g}" for value in sorted(own))
    if found.norm_eps is not None and keep:
        if own == {found.norm_eps}:
            return []
        return [f"epsilon of the norms stays {told}, as asked: the source has {found.norm_eps:g}"]
    if found.norm_eps is not None:
        set_norm_eps(model, found.norm_eps)
        return [f"epsilon of the norms set to the source's, {found.norm_eps:g}"]
    if own == {found.dialect.norm_eps}:
        return []
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
    head: Head,
) -> LoadReport:
    """Load a network of another kind, such as FC-DenseNet: its keys must be the file's.

    Raises:
        WeightsError: as `load_weights`.
    """
    if dialect not in ("auto", "densely"):
        raise WeightsError(f"{type(model).__name__}: no DenseNet: has no dialects but densely's")
    own, tensors = state_of(model), contents.tensors
    prefixes = {
        key[: -len(name)] for name in list(own)[:1] for key in tensors if key.endswith(name)
    }
    prefix = next((p for p in prefixes if all(key.startswith(p) for key in tensors)), "")
    tensors = {key[len(prefix) :]: value for key, value in tensors.items()}
    expected, skipped, fresh = dict(own), [], []
    heads = [key for key in own if key.startswith("classifier.")]
    if head == "auto":
        same = all(key in tensors and fits(tensors[key], own[key]) for key in heads)
        head = "load" if same else "skip"
    if head == "skip":
        skipped = [key for key in tensors if key.startswith("classifier.")]
        tensors = {key: value for key, value in tensors.items() if key not in skipped}
        expected = {key: value for key, value in own.items() if key not in heads}
        fresh = heads
    differing = mismatch(tensors, expected)
    if any(differing):
        classes = [value for key, value, _ in differing.wrong if key == "classifier.bias"]
        hint = ""
        if classes and classes[0].dim():
            count = classes[0].shape[0]
            hint = f"\n  this is a {count}-class head: pass num_classes={count} or head='skip'"
        raise WeightsError(
            explain(
                where,
                "densely",
                {},
                {},
                missing=differing.missing,
                wrong=differing.wrong,
                unexpected=differing.unexpected,
            )
            + hint
        )
    _require_numbers(own, where)
    model.load_state_dict(own | tensors)
    ignored = tuple(f"{key} ({what})" for key, what in contents.ignored.items())
    return LoadReport(where, "densely", prefix, len(tensors), tuple(skipped), tuple(fresh), ignored)


def _classes(weights: Mapping[Place, Tensor]) -> int | None:
    head = weights.get(HEAD_KERNEL)
    return None if head is None or head.dim() == 0 else head.shape[0]
