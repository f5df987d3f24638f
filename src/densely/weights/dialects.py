"""What each package calls the weights of a DenseNet: a page of names, and their translation.

Every package builds the same parts and names them in its own way. A weight's `Place` says what it
is (which layer of which block, which of its parts, which variable), and a `Dialect` is the table
from places to names. Translation is `ours.name(theirs.place(key))`.

densely's own keys are torchvision's.

Source: the packages' code; Keras's kernels are (h, w, in, out) and its norms' epsilon 1.001e-5.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from densely.errors import ConfigError, unknown_name

Kind = Literal["stem", "layer", "transition", "final", "head"]


class Place(NamedTuple):
    """What a weight is: `block` and `layer` count from 1, and are 0 where there is none."""

    kind: Kind
    block: int
    layer: int
    part: str
    variable: str

    @property
    def is_count(self) -> bool:
        """Whether it counts batches, which PyTorch alone does: files may lack it."""
        return self.variable == "num_batches_tracked"


_TORCH = {
    name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}
_KERAS = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_STEM = {f"{kind}{i}": f"features.{kind}{i}" for i in range(3) for kind in ("conv", "norm")}
_LAYER = {part: part for part in ("norm1", "conv1", "norm2", "conv2")}
_AUTHORS_LAYER = {"norm1": "bn1", "conv1": "conv1", "norm2": "bn2", "conv2": "conv2"}


@dataclass(frozen=True)
class Dialect:
    """Names of one package.

    In templates {b} and {i} are block and layer from 1 on, {b1} is b + 1, {i0} is i - 1, and
    {part} a part's name.

    Args:
        name: as users type it.
        about: whose it is.
        stem: template of each of the stem's parts.
        layer, layer_parts: of a dense layer's parts.
        transition, transition_parts: of a transition's parts.
        final: the last norm.
        head: the classifier; `other_heads` are read as well.
        variables: what a part's tensors are called, to PyTorch's names.
        separator: between a part and its variable.
        extras: keys beside the network's own that its files may hold, and that mean nothing here.
        norm_eps: epsilon of its norms.
    """

    name: str
    about: str
    stem: Mapping[str, str] = field(default_factory=lambda: _STEM)
    layer: str = "features.denseblock{b}.denselayer{i}.{part}"
    layer_parts: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    transition: str = "features.transition{b}.{part}"
    transition_parts: Mapping[str, str] = field(
        default_factory=lambda: {"norm": "norm", "conv": "conv"}
    )
    final: str = "features.norm5"
    head: str = "classifier"
    other_heads: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=lambda: _TORCH)
    separator: str = "."
    extras: tuple[str, ...] = ()
    norm_eps: float = 1e-5

    @property
    def is_keras(self) -> bool:
        """Whether kernels lie as Keras has them."""
        return self.variables is _KERAS

    @property
    def anchor(self) -> str:
        """Key of the first kernel, which every file has: what stands before it is a wrapper's."""
        return self.stem["conv0"] + self.separator + ("kernel" if self.is_keras else "weight")

    def name_of(self, place: Place) -> str | None:
        """The key of a place; None where this package has no such part."""
        kind, block, layer, part, variable = place
        if kind == "stem":
            module = self.stem.get(part)
        elif kind == "layer":
            module = self._filled(self.layer, self.layer_parts.get(part), block, layer)
        elif kind == "transition":
            module = self._filled(self.transition, self.transition_parts.get(part), block, layer)
        else:
            module = self.final if kind == "final" else self.head
        is_norm = kind == "final" or part.startswith("norm")
        if self.is_keras and variable == "bias" and part.startswith("conv"):
            return None  # Keras builds them without
        for theirs, ours in self.variables.items():
            if ours == variable and (not self.is_keras or (theirs in _NORM_ONLY) == is_norm):
                return None if module is None else module + self.separator + theirs
        return None

    def place_of(self, key: str) -> Place | None:
        """What a key names; None for a key that is none of this package's."""
        module, _, variable = key.rpartition(self.separator)
        if variable not in self.variables:
            return None
        variable = self.variables[variable]
        for part, name in self.stem.items():
            if module == name:
                return Place("stem", 0, 0, part, variable)
        if module == self.final:
            return Place("final", 0, 0, "norm5", variable)
        if module in (self.head, *self.other_heads):
            return Place("head", 0, 0, "classifier", variable)
        for kind, pattern, parts in self._patterns:
            if found := pattern.fullmatch(module):
                numbers = found.groupdict()
                block = int(numbers.get("b") or int(numbers.get("b1") or 0) - 1)
                layer = int(numbers.get("i") or int(numbers.get("i0") or -1) + 1)
                place = Place(kind, block, layer, parts[numbers["part"]], variable)
                # Leading zeros would make one place of two keys.
                return place if self.name_of(place) == key else None
        return None

    def to_torch(self, place: Place, tensor: Tensor) -> Tensor:
        """A tensor of this dialect as PyTorch has it."""
        if self.is_keras and place.variable == "weight" and tensor.dim() >= 2:
            return tensor.movedim((-1, -2), (0, 1)).contiguous()
        return tensor

    def from_torch(self, place: Place, tensor: Tensor) -> Tensor:
        """The other way round."""
        if self.is_keras and place.variable == "weight" and tensor.dim() >= 2:
            return tensor.movedim((0, 1), (-1, -2)).contiguous()
        return tensor

    @staticmethod
    def _filled(template: str, part: str | None, block: int, layer: int) -> str | None:
        if part is None:
            return None
        return template.format(b=block, b1=block + 1, i=layer, i0=layer - 1, part=part)

    @cached_property
    def _patterns(self) -> list[tuple[Kind, re.Pattern[str], dict[str, str]]]:
        patterns: list[tuple[Kind, re.Pattern[str], dict[str, str]]] = []
        tables: list[tuple[Kind, str, Mapping[str, str]]] = [
            ("layer", self.layer, self.layer_parts),
            ("transition", self.transition, self.transition_parts),
        ]
        for kind, template, parts in tables:
            pattern = re.escape(template)
            for number in ("b", "b1", "i", "i0"):
                pattern = pattern.replace(rf"\{{{number}\}}", rf"(?P<{number}>\d{{1,4}})")
            choices = "|".join(map(re.escape, parts.values()))
            pattern = pattern.replace(r"\{part\}", rf"(?P<part>{choices})")
            patterns.append((kind, re.compile(pattern, re.ASCII), {v: k for k, v in parts.items()}))
        return patterns


_NORM_ONLY = ("gamma", "beta", "moving_mean", "moving_variance")

#: In the order in which they are tried; of two that fit as well, the first one counts.
DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "torchvision",
            "torchvision, timm, torchxrayvision, densely; CheXNet's head is classifier.0",
            other_heads=("classifier.0",),
            extras=("op_threshs",),
        ),
        Dialect(
            "torchvision_legacy",
            "torchvision before 2018 and its published files: norm.1 in place of norm1",
            layer_parts={
                "norm1": "norm.1", "conv1": "conv.1", "norm2": "norm.2", "conv2": "conv.2",
            },
            other_heads=("classifier.0",),
        ),
        Dialect(
            "monai",
            "MONAI, in 1, 2 and 3 dimensions",
            layer="features.denseblock{b}.denselayer{i}.layers.{part}",
            head="class_layers.out",
        ),
        Dialect(
            "keras",
            "keras.applications (.h5 and .weights.h5)",
            stem={"conv0": "conv1_conv", "norm0": "conv1_bn"},
            layer="conv{b1}_block{i}_{part}",
            layer_parts={"norm1": "0_bn", "conv1": "1_conv", "norm2": "1_bn", "conv2": "2_conv"},
            transition="pool{b1}_{part}",
            transition_parts={"norm": "bn", "conv": "conv"},
            final="bn",
            head="predictions",
            other_heads=("dense",),  # Keras's own name for a head that a user put on top
            variables=_KERAS,
            separator="/",
            norm_eps=1.001e-5,
        ),
        Dialect(
            "efficient",
            "efficient_densenet_pytorch: norm_final in place of norm5",
            final="features.norm_final",
        ),
        Dialect(
            "andreasveit",
            "densenet-pytorch of A. Veit, for small images",
            stem={"conv0": "conv1"},
            layer="block{b}.layer.{i0}.{part}",
            layer_parts=_AUTHORS_LAYER,
            transition="trans{b}.{part}",
            transition_parts={"norm": "bn1", "conv": "conv1"},
            final="bn1",
            head="fc",
        ),
        Dialect(
            "bamos",
            "densenet.pytorch of B. Amos, for small images",
            stem={"conv0": "conv1"},
            layer="dense{b}.{i0}.{part}",
            layer_parts=_AUTHORS_LAYER,
            transition="trans{b}.{part}",
            transition_parts={"norm": "bn1", "conv": "conv1"},
            final="bn1",
            head="fc",
        ),
    )
}  # fmt: skip

#: Packages whose names are another dialect's.
ALIASES = {
    "densely": "torchvision",
    "timm": "torchvision",
    "torchxrayvision": "torchvision",
    "efficient_densenet_pytorch": "efficient",
}
OURS = DIALECTS["torchvision"]


def named_dialect(name: object, *others: str) -> Dialect:
    """The dialect of a package; `others` are names that would be right as well.

    Raises:
        ConfigError: an unknown one; the nearest are named.
    """
    if not isinstance(name, str) or ALIASES.get(name, name) not in DIALECTS:
        raise ConfigError(unknown_name("dialect", str(name), [*others, *DIALECTS, *ALIASES]))
    return DIALECTS[ALIASES.get(name, name)]


class Found(NamedTuple):
    """A dialect, what a wrapper put before its keys, and how many keys it explains."""

    dialect: Dialect
    prefix: str
    explained: int


def candidates(keys: Iterable[str], dialects: Iterable[Dialect] = DIALECTS.values()) -> list[Found]:
    """Dialects and prefixes that explain some of `keys`, the best one first."""
    names = list(keys)
    found = []
    for dialect in dialects:
        prefixes = {
            key[: -len(dialect.anchor)]
            for key in names
            if key.endswith(dialect.anchor) and key[: -len(dialect.anchor)][-1:] in ("", ".", "/")
        }
        explained = dict.fromkeys(sorted(prefixes), 0)
        layered = set()  # every DenseNet has dense layers; a `conv1` alone has many a network
        for key in names:
            for cut in (0, *(at + 1 for at, letter in enumerate(key) if letter in "./")):
                if key[:cut] in prefixes and (place := dialect.place_of(key[cut:])):
                    explained[key[:cut]] += 1
                    if place.kind == "layer":
                        layered.add(key[:cut])
        found += [Found(dialect, prefix, explained[prefix]) for prefix in sorted(layered)]
    return sorted(found, key=lambda one: -one.explained)
