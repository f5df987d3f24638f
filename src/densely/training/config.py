"""What a training run is: one frozen dataclass, from which flags, help and YAML are made.

Importing this module does not import torch, so that `--help` answers at once.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from densely.errors import ConfigError, unknown_name

T = TypeVar("T")

#: A part of the data.
Split = Literal["train", "validation", "test"]

#: What may differ when a run goes on: how long, where and how fast, not what. Data may have moved:
#: whether they are still the same images is checked by their digest.
FREE_ON_RESUME = ("epochs", "data", "data_dir", "device", "precision", "memory_format")

_DECIDED = ("num_classes", "in_channels", "image_size", "spatial_dims")  # options, by the data


def _option(default: T, group: str, help: str) -> T:
    return dataclasses.field(default=default, metadata={"group": group, "help": help})


_SOURCE, _WHAT, _IMAGES = "where values come from", "what to learn", "which images"
_HOW, HARDWARE, _WHERE = "how to learn", "on which hardware", "where it goes"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run; checked when made, all faults at once.

    The defaults are those of the quick start; `from_values` begins with another recipe's.

    Raises:
        ConfigError: fields of a wrong type or out of range.
    """

    recipe: str = _option("quickstart", _SOURCE, "the recipe that gave all values not set by hand")
    model: str = _option("densenet_bc_22_12", _WHAT, "network, such as d2l or densenet121")
    options: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata={
            "group": _WHAT,
            "help": "further arguments of the network, such as {transition_pool: max}; one of them "
            "by --options.transition_pool max",
        },
    )
    weights: str | None = _option(
        None,
        _WHAT,
        "where to start: imagenet or another tag of published weights, or a file of weights of any "
        "dialect; null for fresh ones",
    )
    data: str = _option(
        "digits",
        _WHAT,
        "digits, fashion-mnist, or a folder of images sorted by class, perhaps with train/, val/ "
        "and test/ above; notes say what was left out",
    )
    data_dir: str | None = _option(
        None, _WHAT, "where the files of a named data set are looked for first, before DENSELY_DATA"
    )
    image_size: int | None = _option(
        None,
        _WHAT,
        "side in pixels of the squares that images are scaled to; null for their own, or 96 where "
        "those of a folder are larger or of several sizes. Networks for ImageNet have a small stem "
        "up to 64",
    )
    normalize: bool = _option(
        True,
        _WHAT,
        "subtract the mean and divide by the deviation of the training pixels, or those that "
        "published weights were trained with",
    )
    validation: float = _option(
        0.1,
        _IMAGES,
        "share of training images set aside to choose the best epoch; 0 for none. Data with "
        "validation images of their own keep those",
    )
    limit: int | None = _option(
        None, _IMAGES, "train on at most so many images, shares in proportion to the classes"
    )
    split_seed: int = _option(0, _IMAGES, "of the splits into training, validation and test images")
    epochs: int = _option(15, _HOW, "times that each training image is seen")
    batch_size: int = _option(64, _HOW, "images of one step")
    lr: float = _option(0.1, _HOW, "learning rate")
    schedule: Literal["constant", "cosine", "step"] = _option(
        "cosine",
        _HOW,
        "constant learning rate, falling to 0 along half a cosine, or divided by 10 after half and "
        "after three quarters of the epochs",
    )
    momentum: float = _option(0.9, _HOW, "Nesterov momentum of the gradient steps; 0 for plain SGD")
    weight_decay: float = _option(1e-4, _HOW, "L2 penalty")
    augment: Literal["none", "crop-flip"] = _option(
        "none", _HOW, "crop-flip shifts training images by up to an eighth and mirrors half of them"
    )
    norm_batches: int = _option(
        0,
        _HOW,
        "average the statistics of batch norms over so many batches before evaluating, as is "
        "wise at a high constant rate; 0 keeps the running ones",
    )
    evaluate_every: int = _option(
        1,
        _HOW,
        "epochs from one evaluation on held-out images to the next; the last is always evaluated",
    )
    seed: int = _option(0, _HOW, "of initial weights and of the order of images")
    device: str = _option(
        "auto", HARDWARE, "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
    )
    precision: Literal["auto", "float32", "bfloat16"] = _option(
        "auto",
        HARDWARE,
        "of convolutions and products; auto takes bfloat16 where the hardware has it",
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = _option(
        "auto", HARDWARE, "layout of images; auto takes what is fastest on the device"
    )
    output: str = _option(
        "runs", _WHERE, "folder that receives the run, as NAME-001, NAME-002, ..."
    )
    name: str | None = _option(None, _WHERE, "name of the run; null takes the recipe's")

    def __post_init__(self) -> None:
        faults = _type_faults(self)
        if not faults:
            faults = [
                f"{name}={getattr(self, name)}: must be {rule}"
                for name, rule, holds in self._rules()
                if not holds
            ]
        if faults:
            raise ConfigError("; ".join(faults))

    def _rules(self) -> list[tuple[str, str, bool]]:
        return [
            ("epochs", "at least 1", self.epochs >= 1),
            ("batch_size", "at least 2, for batch statistics", self.batch_size >= 2),
            ("lr", "above 0 and finite", 0 < self.lr < math.inf),
            ("momentum", "at least 0 and below 1", 0 <= self.momentum < 1),
            ("weight_decay", "at least 0 and finite", 0 <= self.weight_decay < math.inf),
            ("norm_batches", "at least 0", self.norm_batches >= 0),
            ("evaluate_every", "at least 1", self.evaluate_every >= 1),
            ("validation", "at least 0 and below 1", 0 <= self.validation < 1),
            ("limit", "at least 2", self.limit is None or self.limit >= 2),
            (
                "image_size",
                "from 4 to 4096",
                self.image_size is None or 4 <= self.image_size <= 4096,
            ),
            (
                "options",
                f"without what the data decide: {', '.join(_DECIDED)}",
                not self.options.keys() & set(_DECIDED),
            ),
            ("seed", "from 0 to 2^32 - 1", 0 <= self.seed < 2**32),
            ("split_seed", "from 0 to 2^32 - 1", 0 <= self.split_seed < 2**32),
            (
                "name",
                "a plain file name",
                self.name is None
                or (self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0\n")),
            ),
            *(
                (field, "text that is not empty and can be part of a path", _is_path(text))
                for field in ("model", "weights", "data", "data_dir", "output", "name")
                if (text := getattr(self, field)) is not None
            ),
        ]

    @property
    def run_name(self) -> str:
        """Name of the run without its number."""
        return self.name or self.recipe

    def to_yaml(self) -> str:
        """All fields as YAML, in the order of the class; `from_values` reads it back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "TrainConfig":
        """Make a config from a recipe and what differs from it.

        Args:
            values: fields by name; those not named come from the recipe `values["recipe"]`.

        Raises:
            ConfigError: an unknown recipe or field (the nearest are named), or a wrong value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{type(values).__name__} given, fields by their names expected")
        name = str(values.get("recipe", "quickstart"))
        if name not in RECIPES:
            raise ConfigError(unknown_name("recipe", name, RECIPES))
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [unknown_name("field", str(key), known) for key in values if key not in known]
        if unknown:
            raise ConfigError("; ".join(unknown))
        return dataclasses.replace(RECIPES[name], **values)


def _is_path(text: str) -> bool:
    try:
        return text.encode() != b"" and "\0" not in text
    except UnicodeEncodeError:  # bytes of a file name that are no UTF-8
        return False


class _Loader(yaml.SafeLoader):
    """PyYAML's, which would take the last of two values of one name without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        # Of merge keys, `<<`, there may be several; what they bring in is not here yet.
        names = [(key.tag, key.value) for key in keys if not key.tag.endswith(":merge")]
        if twice := {name for tag, name in names if names.count((tag, name)) > 1}:
            raise yaml.YAMLError(f"{', '.join(sorted(twice))}: given twice")
        return node


def parse_yaml(text: str) -> Any:
    """The value that a text in YAML stands for.

    Raises:
        ConfigError: it is no YAML, or gives a name twice.
    """
    try:
        return yaml.load(text, _Loader)  # a safe one
    except (yaml.YAMLError, ValueError) as error:  # PyYAML's dates raise the plain one
        raise ConfigError(f"no valid YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the fields in a YAML file.

    Raises:
        ConfigError: no such file, no YAML, or not a mapping of fields to values.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines such as 'lr: 0.1'")
    return values


def _type_faults(config: TrainConfig) -> list[str]:
    """Values whose type is not the field's, as a YAML file or Python code may give them."""
    faults = []
    for name, hint in get_type_hints(TrainConfig).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                faults.append(f"{name}={value!r}: must be one of {', '.join(get_args(hint))}")
            continue
        allowed = (dict,) if get_origin(hint) is dict else get_args(hint) or (hint,)
        if float in allowed and type(value) in (int, str):
            # `lr: 1` means 1.0, and `lr: 1e-3` is a text to YAML 1.1, which wants a dot.
            with contextlib.suppress(ValueError, OverflowError):
                value = float(value)
                object.__setattr__(config, name, value)
        if type(value) not in allowed:
            names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
            faults.append(f"{name}={value!r}: must be of type {names}")
    return faults


RECIPES = {
    # Learns scikit-learn's bundled digits in well under two minutes on two CPU cores.
    "quickstart": TrainConfig(recipe="quickstart"),
    # The chapter: Dive into Deep Learning 8.7, Fashion-MNIST at 96x96, plain SGD, no validation
    # split, pixels in [0, 1]. Training is the chapter's to the letter. One thing is not: the
    # statistics that batch norms are evaluated with. The running ones lag so far behind at this
    # rate that the test accuracy jumps between 0.71 and 0.91 (docs/results.md); norm_batches=0
    # brings that back.
    "d2l": TrainConfig(
        recipe="d2l",
        model="d2l",
        data="fashion-mnist",
        image_size=96,
        normalize=False,
        validation=0.0,
        epochs=10,
        batch_size=256,
        lr=0.1,
        schedule="constant",
        momentum=0.0,
        weight_decay=0.0,
        norm_batches=20,
    ),
    # The paper's networks for images of 32 pixels with its recipe (section 4.2, C10+); name the
    # folder of images with data.
    "cifar": TrainConfig(
        recipe="cifar",
        model="densenet_bc_100_12",
        data="cifar10",
        image_size=32,
        validation=0.0,
        epochs=300,
        batch_size=64,
        lr=0.1,
        schedule="step",
        augment="crop-flip",
        momentum=0.9,
        weight_decay=1e-4,
    ),
}
