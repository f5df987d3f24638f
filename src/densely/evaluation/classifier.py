"""A trained network with all that it needs to name what is in a picture."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from densely.data.images import decode, open_image
from densely.errors import DataError, RunError
from densely.evaluation.calibration import Calibration, load_calibration, weights_digest
from densely.forward import Forward
from densely.runtime import MemoryFormat, Precision, Runtime, choose_runtime
from densely.training.checkpoint import ModelInfo, find_checkpoint, load_model
from densely.training.run import RunDirectory
from densely.training.scoring import BATCH_SIZE, logits_of

ImageLike = str | os.PathLike[str] | Image.Image


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image.

    Args:
        label: name of the likeliest class.
        probability: the network's probability of it, in [0, 1]; calibrated where the run is.
        probabilities: of every class, likeliest first.
        sure: whether `probability` reaches the threshold for the wanted error; None where no error
            was named, or no threshold could be found for it.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    sure: bool | None = None


class Classifier:
    """A network, its classes and its preprocessing, placed on a device; made by `densely.load`.

    `calibration` turns its logits into probabilities that can be believed; None for the bare ones.
    `weights_digest` names the weights that were read.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        info: ModelInfo,
        runtime: Runtime,
        calibration: Calibration | None = None,
        weights_digest: str = "",
    ) -> None:
        self.calibration, self.weights_digest = calibration, weights_digest
        self.model, self.info = runtime.place(model), info
        self.classes, self.preprocessing = info.classes, info.preprocessing
        self.runtime, self.forward = runtime, Forward(self.model, runtime)

    def predict(self, images: ImageLike | Iterable[ImageLike]) -> list[Prediction]:
        """Name what is in each image.

        Args:
            images: paths of PNG, JPEG, BMP or WebP files, or Pillow images, of any size and mode;
                one, or several.

        Returns:
            One prediction an image, in their order.

        Raises:
            DataError: an image cannot be read; it is named.
            RunError: the network gives NaN or infinity.
        """
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        if not isinstance(images, Iterable):
            raise DataError(f"{type(images).__name__}: expected paths or Pillow images")
        predictions = []
        for found in self.predict_each(images):
            if isinstance(found, DataError):
                raise found
            predictions.append(found)
        return predictions

    def predict_each(self, images: Iterable[ImageLike]) -> Iterator[Prediction | DataError]:
        """`predict`, batch by batch, with an error in the place of an image that cannot be read.

        Raises:
            RunError: the network gives NaN or infinity.
        """
        several = iter(images)
        while batch := list(islice(several, BATCH_SIZE)):
            read = [self._pixels_or_error(image) for image in batch]
            pixels = [image for image in read if isinstance(image, Tensor)]
            found = iter(self._predictions(torch.stack(pixels)) if pixels else ())
            for image in read:
                yield image if isinstance(image, DataError) else next(found)

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities of uint8 images [N, C, H, W]: float32 [N, classes] on the CPU.

        Raises:
            DataError: images of another dtype, or of other channels than the network reads.
        """
        channels = self.preprocessing.channels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
            raise DataError(
                f"images of shape {list(images.shape)}, {images.dtype}: expected uint8 "
                f"[images, {channels}, height, width]"
            )
        return self._probabilities(images, self.preprocessing).float()

    def _probabilities(self, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        images = images.to(self.runtime.device)
        logits = logits_of(self.forward, images, prepare).cpu()
        return (self.calibration or Calibration.none(len(self.classes))).probabilities(logits)

    def _predictions(self, pixels: Tensor) -> list[Prediction]:
        probabilities = self._probabilities(pixels, self.preprocessing.scale)
        if not probabilities.isfinite().all():
            raise RunError("the network gives NaN or infinity: its training has diverged")
        return [self._prediction(image) for image in probabilities]

    def _pixels_or_error(self, image: ImageLike) -> Tensor | DataError:
        try:
            return self._pixels(image)
        except DataError as error:
            return error

    def _pixels(self, image: ImageLike) -> Tensor:
        channels = self.preprocessing.channels
        if isinstance(image, Image.Image):
            pixels = decode(image, channels, "image")
        elif isinstance(image, str | os.PathLike):
            with open_image(Path(image)) as opened:
                pixels = decode(opened, channels, os.fspath(image))
        else:
            raise DataError(f"{type(image).__name__}: expected a path or a Pillow image")
        return self.preprocessing.fit(pixels[None])[0]

    def _prediction(self, probabilities: Tensor) -> Prediction:
        order = probabilities.argsort(descending=True, stable=True).tolist()
        ranked = {self.classes[i]: probabilities[i].item() for i in order}
        label = self.classes[order[0]]
        threshold = self.calibration.threshold if self.calibration else None
        sure = None if threshold is None else ranked[label] >= threshold
        return Prediction(label, ranked[label], ranked, sure)


def load(
    run: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: Precision = "auto",
    memory_format: MemoryFormat = "auto",
    calibrated: bool = True,
) -> Classifier:
    """Load the network of a run, ready to predict.

    Args:
        run: a run directory; its best checkpoint is taken where there is one, else its last.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "float32" or "bfloat16".
        memory_format: "auto", "contiguous" or "channels_last".
        calibrated: whether to calibrate probabilities as `densely evaluate` has fitted it, if it
            has.

    Raises:
        RunError: no run, no checkpoint in it yet, or a damaged one.
    """
    weights = RunDirectory.open(Path(run)).weights()
    folder = find_checkpoint(weights)
    # Before they are read: if they change meanwhile, the digest is that of none that are there.
    digest = weights_digest(folder) if folder else ""
    model, info = load_model(weights)
    calibration = (
        load_calibration(folder, digest, len(info.classes)) if folder and calibrated else None
    )
    runtime = choose_runtime(device, precision, memory_format)
    return Classifier(model, info, runtime, calibration, digest)
