"""Accuracy, loss and confusions of a run on images that it did not learn from."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densely.evaluation.judged import Judged, judge
from densely.runtime import MemoryFormat, Precision
from densely.training.config import Split
from densely.training.scoring import score


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
            The latter's folder is known wherever it has been moved or copied to; another one,
            without train/ in it, is judged on as a whole.
        split: part of the data: "test", "validation" or "train".
        data_dir: where the files of a named data set are looked for first; None for where the run
            found them.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "float32" or "bfloat16".
        memory_format: "auto", "contiguous" or "channels_last".

    Raises:
        DenselyError: the run or the data are missing or damaged, or do not fit each other.
    """
    return evaluation_of(
        judge(
            run,
            data,
            split=split,
            data_dir=data_dir,
            device=device,
            precision=precision,
            memory_format=memory_format,
        )
    )


def evaluation_of(judged: Judged) -> Evaluation:
    """Sum up what a network says of a set of images."""
    from sklearn.metrics import confusion_matrix

    result = score(judged.logits, judged.labels)
    classes = judged.classifier.classes
    confusion = confusion_matrix(
        judged.labels, judged.logits.argmax(dim=1), labels=range(len(classes))
    )
    return Evaluation(
        judged.data, len(judged.labels), result.accuracy, result.loss, classes, confusion
    )
