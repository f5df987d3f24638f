"""Accuracy, loss and confusions of a run on images that it did not learn from."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densely.evaluation.classifier import load
from densely.evaluation.judged import Split, judged_images
from densely.runtime import MemoryFormat, Precision, keep_freed_memory
from densely.training.run import RunDirectory
from densely.training.scoring import logits_of, score


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
    name, images = judged_images(RunDirectory.open(Path(run)), classifier, data, split, data_dir)
    images = images.to(runtime.device)
    logits = logits_of(classifier.model, images.images, classifier.preprocessing, runtime)
    result = score(logits, images.labels)
    confusion = confusion_matrix(
        images.labels.cpu(), logits.argmax(dim=1).cpu(), labels=range(len(classifier.classes))
    )
    return Evaluation(
        name, len(images), result.accuracy, result.loss, classifier.classes, confusion
    )
