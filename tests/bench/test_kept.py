"""Bytes kept for the backward pass, against counts by hand."""

import torch
from tiny_nets import NET, RUNTIME, mlp
from torch import Tensor, nn

from densely.bench.kept import kept_bytes
from densely.bench.trial import make_trial
from densely.bench.variants import Variant


class TwoViews(nn.Module):
    """Saves two views of one storage of 20 numbers an image, for two products."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.linear(x.flatten(1))
        return wide[:, :10] * wide[:, 10:]


def test_activations_count_once_and_parameters_images_and_labels_not() -> None:
    trial = make_trial(Variant("", mlp, RUNTIME), NET, "train", 3)
    # The ReLU's output, which ReLU and the second product share; log-softmax; the loss's weight.
    assert kept_bytes(trial) == 4 * (3 * 5 + 3 * 10 + 1)


def test_views_of_one_storage_count_once() -> None:
    trial = make_trial(Variant("", TwoViews, RUNTIME), NET, "train", 3)
    assert kept_bytes(trial) == 4 * (3 * 20 + 3 * 10 + 1)


def test_counting_leaves_the_gradients_as_they_are() -> None:
    trial = make_trial(Variant("", mlp, RUNTIME), NET, "train", 3)
    kept_bytes(trial)
    assert all(p.grad is None for p in trial.model.parameters())
    assert torch.isfinite(trial.step())
