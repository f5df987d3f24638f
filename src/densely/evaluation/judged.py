"""Which images a run is judged on: the ones that it set aside, or others."""

import dataclasses
from pathlib import Path
from typing import Literal

from densely.data import ImageSet, Splits, absolute, load_data
from densely.data.folder import load_labelled
from densely.errors import ConfigError, DataError
from densely.evaluation.classifier import Classifier
from densely.training.checkpoint import load_state
from densely.training.run import RunDirectory
from densely.training.splits import splits_of

Split = Literal["train", "validation", "test"]


def judged_images(
    run: RunDirectory, classifier: Classifier, data: str | None, split: Split, data_dir: str | None
) -> tuple[str, ImageSet]:
    """Name and images of what a run is judged on, labelled by the run's own classes.

    Args:
        run: the run directory.
        classifier: its network.
        data: another data set or folder; None for what the run learned from.
        split: part of the data.
        data_dir: where the files of a named data set are looked for first; None for where the run
            found them.

    Raises:
        DataError: the data are missing, have changed since, or have other classes.
        ConfigError: there is no such split.
    """
    config, prep = run.config(), classifier.preprocessing
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=data_dir)
    source = config.data if data is None else absolute(data)
    if source == config.data:
        splits = splits_of(config, image_size=prep.image_size, channels=prep.channels)
        if splits.train.digest() != load_state(run.weights()).data_digest:
            raise DataError(
                f"{source} has changed since {run.path} learned from it: which of its images are "
                "unseen cannot be told; name a folder of new images with --data"
            )
    elif Path(source).is_dir() and not (Path(source) / "train").is_dir():
        folder = Path(source)
        return source, load_labelled(folder, classifier.classes, prep.image_size, prep.channels)
    else:
        splits = load_data(
            source,
            data_dir=config.data_dir,
            image_size=prep.image_size,
            channels=prep.channels,
            split_seed=config.split_seed,
        )
    images = _part(splits, split)
    if images.classes != classifier.classes:
        raise DataError(
            f"{source} has the classes {_listed(images.classes)}, and {run.path} knows "
            f"{_listed(classifier.classes)}"
        )
    return f"{source}, {split}", images


def _part(splits: Splits, split: Split) -> ImageSet:
    images = {"train": splits.train, "validation": splits.validation, "test": splits.test}[split]
    if images is None:
        raise ConfigError(f"--split validation: {splits.name} has no validation split here")
    return images


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")
