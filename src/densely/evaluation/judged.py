"""Which images a run is judged on: the ones that it set aside, or others."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from torch import Tensor

from densely.data import ImageSet, Splits, absolute, load_data, with_validation
from densely.data.folder import load_labelled
from densely.data.layout import find_parts, has_splits
from densely.errors import ConfigError, DataError
from densely.evaluation.classifier import Classifier, load
from densely.evaluation.scores import check_logits
from densely.runtime import MemoryFormat, Precision, settle_process
from densely.training.checkpoint import load_state
from densely.training.config import Split, TrainConfig
from densely.training.run import RunDirectory
from densely.training.scoring import logits_of
from densely.training.splits import splits_of
from densely.words import listed

#: Share of the training images that stand in where a run set none aside for validation.
STAND_IN_SHARE = 0.1


@dataclass(frozen=True)
class Judged:
    """A network and what it says of a set of images.

    Args:
        run: the run directory.
        classifier: its network.
        data: name of the images.
        images: uint8 images and labels, on the device.
        own: all splits of the run, where it is judged on one of them.
        logits: float32 [N, K] on the CPU, not calibrated; all finite.
        labels: int64 [N] on the CPU.
    """

    run: RunDirectory
    classifier: Classifier
    data: str
    images: ImageSet
    own: Splits | None
    logits: Tensor
    labels: Tensor


def judge(
    run: str | os.PathLike[str],
    data: str | None = None,
    *,
    split: Split = "test",
    data_dir: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    memory_format: MemoryFormat = "auto",
) -> Judged:
    """Let the network of a run see a set of images; see `evaluate` for the arguments.

    Raises:
        DenselyError: the run or the data are missing or damaged, or do not fit each other; or the
            network gives NaN.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split={split!r}: must be one of {', '.join(get_args(Split))}")
    classifier = load(run, device=device, precision=precision, memory_format=memory_format)
    if classifier.runtime.device.type == "cpu":
        settle_process()
    directory = RunDirectory.open(Path(run))
    learned_from = directory.config().data
    source = learned_from if data is None else absolute(data)
    own = (
        own_splits(directory, classifier, data_dir)
        if source == learned_from
        else _own_elsewhere(directory, classifier, source)
    )
    if own is not None:
        name, images = f"{source}, {split}", part_of(own, split)
    else:
        name, images = _other_images(directory, classifier, source, split, data_dir)
    _check_classes(images.classes, source, directory, classifier)
    images, logits = seen(classifier, images)
    return Judged(directory, classifier, name, images, own, logits, images.labels.cpu())


def seen(classifier: Classifier, images: ImageSet) -> tuple[ImageSet, Tensor]:
    """The images on the classifier's device, and its logits of them on the CPU, all finite."""
    images = images.to(classifier.runtime.device)
    logits = logits_of(classifier.forward, images.images, classifier.preprocessing).cpu()
    check_logits(logits, images.classes)
    return images, logits


def own_splits(run: RunDirectory, classifier: Classifier, data_dir: str | None) -> Splits:
    """The images that a run learned from and those that it set aside.

    Args:
        run: the run directory.
        classifier: its network.
        data_dir: where the files of a named data set are looked for first; None for where the run
            found them.

    Raises:
        DataError: the data are missing, or have changed since.
    """
    config = _config(run, data_dir)
    splits = _parted(config, classifier)
    if not _has_learned_from(run, splits.train):
        raise DataError(
            f"{config.data} has changed since {run.path} learned from it: which of its images are "
            "unseen cannot be told; name a folder of new images with --data"
        )
    return splits


def fitting_images(splits: Splits, split_seed: int) -> tuple[str, ImageSet, bool]:
    """Images that calibration and thresholds are fitted on: never those of the test split.

    Args:
        splits: of the run.
        split_seed: as it parted them.

    Returns:
        Their name; the images; and whether the network has learned from them, as it has where the
        run set none aside.
    """
    if splits.validation is not None:
        return "validation split", splits.validation, False
    try:
        splits = with_validation(splits, STAND_IN_SHARE, split_seed)
    except DataError:  # too few to part them
        return "training split", splits.train, True
    assert splits.validation is not None
    return "part of the training split", splits.validation, True


def _own_elsewhere(run: RunDirectory, classifier: Classifier, source: str) -> Splits | None:
    """Splits of the run's own folder where it has been moved or copied to; None for others.

    Taken as a whole, such a folder would be judged with the images that the run learned from.
    """
    if not Path(source).is_dir():
        return None
    try:
        if tuple(find_parts(Path(source))["train"].files) != classifier.classes:
            return None  # without reading its images
        splits = _parted(dataclasses.replace(run.config(), data=source), classifier)
    except DataError:  # it cannot be parted as the run's own was
        return None
    return splits if _has_learned_from(run, splits.train) else None


def _parted(config: TrainConfig, classifier: Classifier) -> Splits:
    prep = classifier.preprocessing
    return splits_of(config, image_size=prep.image_size, channels=prep.channels)


def _has_learned_from(run: RunDirectory, images: ImageSet) -> bool:
    return images.digest() == load_state(run.weights()).data_digest


def _other_images(
    run: RunDirectory, classifier: Classifier, source: str, split: Split, data_dir: str | None
) -> tuple[str, ImageSet]:
    """Name and images of other data than the run's; a folder without train/ is taken as a whole."""
    config, prep = _config(run, data_dir), classifier.preprocessing
    if Path(source).is_dir() and not has_splits(Path(source)):
        folder = Path(source)
        return source, load_labelled(folder, classifier.classes, prep.image_size, prep.channels)
    if Path(source).is_dir():  # before its images are read
        found = tuple(find_parts(Path(source))["train"].files)
        _check_classes(found, source, run, classifier)
    splits = load_data(
        source,
        data_dir=config.data_dir,
        image_size=prep.image_size,
        channels=prep.channels,
        split_seed=config.split_seed,
    )
    return f"{source}, {split}", part_of(splits, split)


def _check_classes(
    classes: tuple[str, ...], source: str, run: RunDirectory, classifier: Classifier
) -> None:
    if classes != classifier.classes:
        raise DataError(
            f"{source} has the classes {listed(classes)}, and {run.path} knows "
            f"{listed(classifier.classes)}"
        )


def _config(run: RunDirectory, data_dir: str | None) -> TrainConfig:
    config = run.config()
    return config if data_dir is None else dataclasses.replace(config, data_dir=data_dir)


def part_of(splits: Splits, split: Split) -> ImageSet:
    """A part of the data by its name.

    Raises:
        ConfigError: there is no validation split.
    """
    images = {"train": splits.train, "validation": splits.validation, "test": splits.test}[split]
    if images is None:
        raise ConfigError(f"--split validation: {splits.name} has no validation split here")
    return images
