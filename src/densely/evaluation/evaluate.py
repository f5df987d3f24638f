"""Accuracy, loss and confusions of a run on images that it did not learn from."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from densely.data import ImageSet, Splits, absolute, load_data
from densely.data.folder import load_labelled
from densely.errors import ConfigError, DataError
from densely.evaluation.classifier import Classifier, load
from densely.runtime import MemoryFormat, Precision, keep_freed_memory
from densely.training.checkpoint import load_state
from densely.training.run import RunDirectory
from densely.training.scoring import logits_of, score
from densely.training.splits import splits_of

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Evaluation:
    """How a network did on a set of images.

    Args:
        data: what it was judged on.
        images: number of images.
        accuracy: share whose likeliest class is right.
        loss: mean cross-entropy in nats.
        classes: names, in the order of `confusion`.
        confusion: int64 [K, K]; row: the true class, column: the class given.
    """

    data: str
    images: int
    accuracy: float
    loss: float
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "data": self.data,
            "images": self.images,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "classes": list(self.classes),
            "confusion": self.confusion.tolist(),
        }


def evaluate(
    run: str | os.PathLike[str],
    data: str | None = None,
    *,
    split: Split = "test",
    data_dir: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    memory_format: MemoryFormat = "auto",
) -> Evaluation:
    """Judge the network of a run.

    Args:
        run: a run directory.
        data: "digits", "fashion-mnist" or a folder of images; None for what the run learned from.
            Another folder than that, without train/ in it, is judged on as a whole.
        split: part of the data: "test", "validation" or "train".
        data_dir: where the files of a named data set are looked for first; None for where the run
            found them.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "float32" or "bfloat16".
        memory_format: "auto", "contiguous" or "channels_last".

    Raises:
        DenselyError: the run or the data are missing or damaged, or do not fit each other.
    """
    from sklearn.metrics import confusion_matrix

    classifier = load(run, device=device, precision=precision, memory_format=memory_format)
    runtime = classifier.runtime
    if runtime.device.type == "cpu":
        keep_freed_memory()
    name, images = _images(RunDirectory.open(Path(run)), classifier, data, split, data_dir)
    images = images.to(runtime.device)
    logits = logits_of(classifier.model, images.images, classifier.preprocessing, runtime)
    result = score(logits, images.labels)
    confusion = confusion_matrix(
        images.labels.cpu(), logits.argmax(dim=1).cpu(), labels=range(len(classifier.classes))
    )
    return Evaluation(
        name, len(images), result.accuracy, result.loss, classifier.classes, confusion
    )


def _images(
    run: RunDirectory, classifier: Classifier, data: str | None, split: Split, data_dir: str | None
) -> tuple[str, ImageSet]:
    """Name and images of what the run is judged on, labelled by the run's own classes."""
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
