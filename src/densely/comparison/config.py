"""What `densely compare` trains: variants of one training configuration, several seeds each.

Importing this module does not import torch, so that `--help` answers at once.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from densely.errors import ConfigError, unknown_name
from densely.training.config import Split, TrainConfig, parse_yaml, read_yaml

#: Bytes of a folder's name, on all usual file systems.
_LONGEST_NAME = 255
#: Decided by the comparison itself, so that no variant may set them.
_RESERVED = ("seed", "split_seed", "output", "name", "recipe")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison by training; checked when made.

    Args:
        name: of the comparison's folder.
        train: what all variants share; its seed is the first one's.
        variants: fields of `train` that a variant changes, by the variant's name.
        seeds: runs of each variant; all variants have the same seeds.
        split: part of the data that all runs are judged on.

    Raises:
        ConfigError: fewer than two variants, unknown fields, or values out of range.
    """

    name: str
    train: TrainConfig
    variants: dict[str, dict[str, Any]]
    seeds: int = 3
    split: Split = "test"

    def __post_init__(self) -> None:
        if type(self.seeds) is not int or self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds}: must be at least 1")
        if self.split not in get_args(Split):
            raise ConfigError(f"split={self.split}: must be one of {', '.join(get_args(Split))}")
        if not isinstance(self.variants, dict) or not all(
            isinstance(name, str) for name in self.variants
        ):
            raise ConfigError("variants: expected names, each with the fields that it changes")
        if len(self.variants) < 2:
            raise ConfigError(
                f"{len(self.variants)} variant(s): at least 2 are needed, such as "
                "--variant 'average: {options: {transition_pool: avg}}' "
                "--variant 'maximum: {options: {transition_pool: max}}'"
            )
        slugs = {slug(name): name for name in self.variants}
        if len(slugs) < len(self.variants):
            raise ConfigError(f"names of variants are too alike: {', '.join(self.variants)}")
        for name in self.variants:
            last = self.config(name, self.seeds - 1)
            if (length := len(f"{last.run_name}-000".encode())) > _LONGEST_NAME:
                raise ConfigError(
                    f"variant '{name}': its runs' folders would have names of {length} bytes, and "
                    f"at most {_LONGEST_NAME} are possible: give it a shorter name"
                )

    def config(self, variant: str, number: int) -> TrainConfig:
        """Training configuration of a variant's run `number`, from 0 on."""
        changes = self.variants[variant]
        known = [field.name for field in dataclasses.fields(TrainConfig)]
        if not isinstance(changes, dict):
            raise ConfigError(f"variant '{variant}': expected fields such as {{model: d2l}}")
        for key in changes:
            if key in _RESERVED:
                raise ConfigError(f"variant '{variant}': {key} is the same for all variants")
            if key not in known:
                raise ConfigError(f"variant '{variant}': {unknown_name('field', str(key), known)}")
        try:
            if isinstance(options := changes.get("options"), dict):
                changes = {**changes, "options": {**self.train.options, **options}}
            return dataclasses.replace(
                self.train,
                **changes,
                seed=self.train.seed + number,
                name=f"{slug(variant)}-seed{self.train.seed + number}",
            )
        except ConfigError as error:
            raise ConfigError(f"variant '{variant}': {error}") from error

    def to_yaml(self) -> str:
        """All fields as YAML; `read` reads it back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    @classmethod
    def read(cls, path: Path) -> "CompareConfig":
        """Read a comparison from a YAML file.

        Raises:
            ConfigError: no such file, or wrong values.
        """
        values = read_yaml(path)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [
            unknown_name("field", str(key), known) for key in values if key not in known
        ]:
            raise ConfigError(f"{path}: {'; '.join(unknown)}")
        if not isinstance(train := values.get("train", {}), dict):
            raise ConfigError(f"{path}: train: expected fields such as {{recipe: d2l}}")
        variants = values.get("variants") or {}
        if isinstance(variants, dict):  # YAML takes 12 for a number
            variants = {str(name): changes for name, changes in variants.items()}
        try:
            return cls(
                name=str(values.get("name", path.stem)),
                train=TrainConfig.from_values(train),
                variants=variants,
                seeds=values.get("seeds", 3),
                split=values.get("split", "test"),
            )
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def slug(name: str) -> str:
    """A file name made of a variant's name."""
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-") or "variant"


def read_variant(text: str) -> tuple[str, dict[str, Any]]:
    """Name and changes of `--variant`: YAML such as 'wide: {options: {growth_rate: 48}}'.

    Raises:
        ConfigError: it is something else.
    """
    expected = "expected 'NAME: {FIELD: VALUE}', as in YAML"
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"--variant {text}: {expected}: {error}") from error
    if isinstance(value, dict) and len(value) == 1:
        ((name, changes),) = value.items()
        if isinstance(changes, dict):
            return str(name), changes
    raise ConfigError(f"--variant {text}: {expected}")


# The chapter's recipe, with a learning rate that falls to 0: at a constant 0.1 the last epoch's
# accuracy jumps about by more than the differences that are looked for (docs/results.md).
_CHAPTER = TrainConfig.from_values({"recipe": "d2l", "schedule": "cosine"})

COMPARISONS = {
    # Chapter 8.7's first claim. The narrow ResNet has the parameters of the DenseNet, within 1%.
    "add-or-concatenate": CompareConfig(
        name="add-or-concatenate",
        train=_CHAPTER,
        variants={
            "DenseNet": {"model": "d2l"},
            "ResNet-18": {"model": "d2l_resnet18"},
            "narrow ResNet-18": {
                "model": "d2l_resnet18",
                "options": {"channels": [17, 33, 66, 134]},
            },
        },
    ),
    # Its second: average pooling in the transitions, and not maximum pooling.
    "average-or-max": CompareConfig(
        name="average-or-max",
        train=_CHAPTER,
        variants={
            "average": {"model": "d2l", "options": {"transition_pool": "avg"}},
            "maximum": {"model": "d2l", "options": {"transition_pool": "max"}},
        },
    ),
}
