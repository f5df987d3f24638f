"""The outputs of a network for a whole set of images, and the two numbers that sum them up."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from densely.data import ImageSet, Preprocessing
from densely.forward import Forward

BATCH_SIZE = 256


def batch_sizes(count: int) -> set[int]:
    """Of the batches in which `logits_of` takes so many images."""
    return {size for size in (min(count, BATCH_SIZE), count % BATCH_SIZE) if size}


def logits_of(
    forward: Forward,
    images: Tensor,
    prepare: Callable[[Tensor], Tensor],
    before_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Logits of uint8 images [N, C, H, W]: float32 [N, num_classes].

    `prepare` makes the model's inputs of them, as a `Preprocessing` does. `before_batch` is called
    before each batch, and may raise to end the work.
    """
    outputs = []
    for batch in torch.split(images, BATCH_SIZE):
        before_batch()
        outputs.append(forward(forward.runtime.layout(prepare(batch))))
    return torch.cat(outputs)


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats, and the share of images whose likeliest class is right."""

    loss: float
    accuracy: float


def score(logits: Tensor, labels: Tensor) -> Score:
    """Loss and accuracy of logits [N, K] against labels [N]."""
    return Score(
        loss=F.cross_entropy(logits.double(), labels).item(),
        accuracy=(logits.argmax(dim=1) == labels).double().mean().item(),
    )


def score_of(
    forward: Forward,
    data: ImageSet,
    preprocessing: Preprocessing,
    before_batch: Callable[[], None] = lambda: None,
) -> Score:
    """Loss and accuracy on `data`, which lives on the runtime's device."""
    return score(logits_of(forward, data.images, preprocessing, before_batch), data.labels)
